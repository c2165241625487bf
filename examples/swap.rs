//! Two adapters in one session: swapped between tokens, in the middle of an answer, without a pause.
//!
//! ```text
//! cargo run --release --example swap -- MODEL.gguf FIRST SECOND "A question?"
//! ```

use std::io::Write;
use std::sync::Arc;

use engraft_runtime::probe::Prober;
use engraft_runtime::*;

/// Tokens after which the second adapter takes over.
const SWAP_AFTER: usize = 12;

/// Prints what it hears, and swaps adapters once.
struct Swapper {
    slot: Arc<AdapterSlot>,
    next: Option<Arc<StackedAdapter>>,
    heard: usize,
}

impl Listener for Swapper {
    fn hear(&mut self, part: &str) -> bool {
        print!("{part}");
        let _ = std::io::stdout().flush();
        self.heard += 1;
        if self.heard == SWAP_AFTER {
            print!(" [swapped] ");
            self.slot.swap(self.next.take());
        }
        true
    }
}

/// An adapter of this very model: what it computes is checked.
fn load(base: &Base, path: &str) -> Result<Arc<StackedAdapter>> {
    let adapter = Adapter::load(path.as_ref())?;
    Prober::new(&base.model, &base.kernels, adapter.layout.rank_max()).check(&adapter)?;
    base.stack(&[(adapter, 1.0)])
}

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, first, second, question] = &arguments[..] else {
        anyhow::bail!("usage: swap MODEL.gguf FIRST SECOND QUESTION");
    };
    let base = Base::open(model)?;
    let text = Text::of(&base.model)?;
    let (first, second) = (load(&base, first)?, load(&base, second)?);

    let slot = Arc::new(AdapterSlot::new(Some(first)));
    let mut sequence = base.sequence(None, 1024)?;
    sequence.follow(slot.clone());
    let mut listener = Swapper { slot, next: Some(second), heard: 0 };
    let prompt = text.chat_prompt(&[Message::new("user", question.as_str())])?;
    let mut sampler = Sampler::new(SamplerOptions { seed: 7, ..SamplerOptions::default() })?;
    let by = (&text.tokenizer, text.tokenizer.decoder());
    go_on(&mut sequence, &prompt, &mut sampler, 64, by, &mut listener)?;
    println!();
    Ok(())
}
