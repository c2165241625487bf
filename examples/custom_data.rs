//! Rows that are in no file and in no format that Engraft knows: made in memory, encoded, trained on.
//!
//! ```text
//! cargo run --release --example custom_data -- MODEL.gguf FOLDER
//! ```

use engraft_runtime::data::Origin;
use engraft_runtime::*;

/// A device's log: what was said, and what was then done.
const LOG: &str = "\
lights off in the kitchen please|kitchen.light=off
make the bedroom warmer|bedroom.heat=+1
is it cold outside|weather.temperature?
turn on the kitchen light|kitchen.light=on
cool the bedroom down|bedroom.heat=-1
how warm is it out there|weather.temperature?
";

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, folder] = &arguments[..] else {
        anyhow::bail!("usage: custom_data MODEL.gguf FOLDER");
    };
    let base = Base::open(model)?;
    let text = Text::of(&base.model)?;
    let reading = DataOptions { max_seq_length: 128, ..DataOptions::default() };

    // Pairs need no file. Only the answer is trained on; the question is its context.
    let pair = |line: &str| line.split_once('|').map(|(said, done)| (said.to_string(), done.to_string()));
    let pairs: Vec<(String, String)> = LOG.lines().filter_map(pair).collect();
    let mut train = Rows::of_pairs("log", &pairs, &text, &reading)?.data.examples;

    // JSON lines need none either.
    let lines = br#"{"text": "Good night means: every light off, every door locked."}"#;
    let origin = Origin::Memory { name: "habits".as_ref(), lines };
    train.extend(Rows::read(origin, &text, &reading)?.data.examples);

    let rows = RunRows { train: &train, ..RunRows::default() };
    let method = Method::usual(base.model.config())?;
    let settings = Settings { length: Length::Epochs(10.0), ..Settings::new(method) };
    let planned = base.plan(&settings, rows, &Limit::here(&base))?;
    let start = Start::Fresh(None);
    let (mut run, _) = Run::begin("", &base, settings, &planned.request, rows, start, &mut Nobody)?;
    run.go(rows, None, &mut Nobody)?;
    if let (Some(file), Some(last)) = (run.save(&Disk, folder.as_ref())?, run.last()) {
        println!(
            "{}: trained on {} rows; loss of the last step {:.3}",
            file.display(),
            train.len(),
            last.loss
        );
    }
    Ok(())
}
