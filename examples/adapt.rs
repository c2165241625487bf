//! From rows to an answer: plan, train, judge, promote, and ask what is active then.
//!
//! ```text
//! cargo run --release --example adapt -- MODEL.gguf ROWS.jsonl STORE "A question?"
//! ```

use engraft_runtime::*;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, rows, folder, question] = &arguments[..] else {
        anyhow::bail!("usage: adapt MODEL.gguf ROWS.jsonl STORE QUESTION");
    };
    let base = Base::open(model)?;
    let text = Text::of(&base.model)?;

    // Rows: one part is trained on, one chooses the best step, and one decides.
    let reading = DataOptions { max_seq_length: 256, ..DataOptions::default() };
    let material = Material::read(rows.as_ref(), &text, &reading, Limits::default())?;

    // Plan: an adapter of the usual size, refused here if the machine has no room for it.
    let (method, length) = (Method::usual(base.model.config())?, Length::Steps(100));
    let lora = Recipe::new("lora", Settings { length, batch: 4, ..Settings::of_arm(method) });
    let limit = Limit::here(&base);
    let planned = lora.check(&base, &material, RunRows::default(), &limit)?;
    eprintln!("training takes {} MiB of private memory", planned.plan.private_bytes >> 20);

    // Train and judge: against the model alone, and by what was forgotten.
    let retention = RetentionSet::built_in(&text, reading.max_seq_length)?;
    let contest = Contest { recipes: vec![lora], retention, limit, ..Contest::new("adapt") };
    let outcome = compare(&base, &material, (&text, &reading), &contest, &mut Nobody)?;
    eprintln!("{}", outcome.verdict.sentence);

    // Promote: only what won becomes active; whatever was active before stays otherwise.
    let store = Store::create(&Disk, folder.as_ref())?;
    outcome.promote(&store.writer()?, &base.model)?;

    // Answer: with the adapter that won, else as the model alone would.
    let adapters = match outcome.winner() {
        Some(Product::Adapter(adapter)) => Some(base.stack(&[(*adapter.clone(), 1.0)])?),
        _ => None,
    };
    let mut sequence = base.sequence(adapters, 1024)?;
    let prompt = text.chat_prompt(&[Message::new("user", question.as_str())])?;
    let (mut sampler, decoder) = (Sampler::new(SamplerOptions::greedy())?, text.tokenizer.decoder());
    let answer =
        go_on(&mut sequence, &prompt, &mut sampler, 128, (&text.tokenizer, decoder), &mut |_: &str| true)?;
    println!("{}", answer.text);
    Ok(())
}
