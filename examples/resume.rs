//! A run that may end at any moment: kill it, start it again, and it goes on from its newest checkpoint. The adapter is
//! the same to the bit as if it had never been stopped.
//!
//! ```text
//! cargo run --release --example resume -- MODEL.gguf ROWS.jsonl FOLDER
//! ```

use engraft_runtime::data::load_train_valid;
use engraft_runtime::*;

/// Prints a line for each report and checkpoint.
struct Printer;

impl Observer for Printer {
    fn go_on(&mut self, _: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        Ok(())
    }

    fn tell(&mut self, _: &str, event: Event<'_>) {
        match event {
            Event::Report(at, means) => eprintln!("step {}: loss {:.3}", at.step, means.loss),
            Event::Look { step, loss, .. } => eprintln!("step {step}: held-out loss {loss:.3}"),
            Event::Checkpoint(step, _) => eprintln!("step {step}: checkpoint"),
            _ => {}
        }
    }
}

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, rows, folder] = &arguments[..] else {
        anyhow::bail!("usage: resume MODEL.gguf ROWS.jsonl FOLDER");
    };
    let base = Base::open(model)?;
    let text = Text::of(&base.model)?;
    let reading = DataOptions { max_seq_length: 256, ..DataOptions::default() };
    let data = load_train_valid(rows.as_ref(), &text.tokenizer, &text.chat, &reading)?;
    let rows = RunRows { train: &data.train.examples, valid: &data.valid.examples, ..RunRows::default() };

    let method = Method::usual(base.model.config())?;
    let settings = Settings { length: Length::Steps(60), checkpoint_every: 10, ..Settings::new(method) };
    let planned = base.plan(&settings, rows, &Limit::here(&base))?;

    // Where the folder holds a checkpoint of this very run, it goes on from there; a checkpoint of other rows, settings
    // or of another model is refused.
    let checkpoints = Checkpoints::open(&Disk, folder.as_ref())?;
    let start = Start::Resume(checkpoints);
    let (mut run, restored) = Run::begin("", &base, settings, &planned.request, rows, start, &mut Printer)?;
    if let Some(found) = restored.found {
        eprintln!("going on from step {}", found.steps);
    }
    run.open(rows, &mut Printer)?;
    run.go(rows, None, &mut Printer)?;
    run.look(rows, &mut Printer)?;
    if let Some(file) = run.save(&Disk, folder.as_ref())? {
        println!("{}", file.display());
    }
    run.remove_checkpoints()?;
    Ok(())
}
