//! The runtime's advice, in terms of command-line flags.

use engraft_runtime::Advice;
use engraft_runtime::error::Error;

/// An error for people: what happened and what to type next.
pub(crate) fn told(error: &Error) -> String {
    match error.advice() {
        None => error.message().to_string(),
        Some(advice) => format!("{}; {}", error.message(), words(advice)),
    }
}

/// What to type next.
fn words(advice: &Advice) -> String {
    let kept = |less: &bool| if *less { "--keep auto " } else { "" };
    match advice {
        Advice::KeepLess => "--keep auto fits (it keeps only what the budget allows)".into(),
        Advice::Batches { batch, tokens: None, was: (was, _), keep_less } => {
            format!("{}--batch-size {batch} fits (it was {was})", kept(keep_less))
        }
        Advice::Batches { batch, tokens: Some(tokens), was, keep_less } => format!(
            "{}--batch-size {batch} --max-seq-length {tokens} fits (they were {} and {})",
            kept(keep_less),
            was.0,
            was.1
        ),
        Advice::SmallerAdapter { rank, tokens, keep_less } => {
            let length = tokens.map_or(String::new(), |tokens| format!(" --max-seq-length {tokens}"));
            format!("{}--rank {rank} --batch-size 1{length} fits", kept(keep_less))
        }
        Advice::UpdateAtOnce => {
            "--max-grad-norm 0 --grad-accumulation-steps 1 fits (it frees each block's gradients \
                                 at once)"
                .into()
        }
        Advice::AdapterInstead { .. } => format!("{advice} (--fine-tune-type lora)"),
        Advice::LessPreparation => "use fewer --eva-batches or fewer --replay-tokens".into(),
        Advice::LowerRate => "lower --learning-rate".into(),
        Advice::LowerRateOrCheckpoints => "lower --learning-rate or --checkpoint-every".into(),
        Advice::ExactActivations => "try --precision f32; if that fails, too, download the file again".into(),
        Advice::LowerRank => "lower --rank".into(),
        Advice::OwnBase => {
            "use the GGUF file that it was made for, or train again on this one; --force-base uses it \
                            anyway if the shapes fit"
                .into()
        }
        Advice::UseAsAdapter => "pass it with --lora, and its model with -m".into(),
        Advice::ReadInstead => {
            "try --no-mmap, which reads the model into memory instead of mapping it".into()
        }
        Advice::MapInstead => "leave out --no-mmap, so that the model is mapped".into(),
        Advice::FewerExamplesOrMoreRows => "lower --shots, or add rows".into(),
        Advice::FewerExamplesOrShorterRows => {
            "raise --memory-budget, or lower --shots or --max-seq-length".into()
        }
        Advice::MaskPrompts => "leave out --no-mask-prompt".into(),
        Advice::AnotherSplit => {
            "add rows, change --valid-fraction, or add your own valid.jsonl and test.jsonl".into()
        }
        Advice::ShorterContext => "use a smaller --ctx-size".into(),
        Advice::LongerContext => "raise --ctx-size".into(),
        Advice::LongerRows => "raise --max-seq-length".into(),
        Advice::AnotherType => "choose another --type".into(),
        Advice::WithoutMagnitudes => {
            "merge it into the model (engraft merge), export it as PEFT (--format peft), or \
                                      write the nearest plain LoRA (--dora-svd-rank), whose error is reported"
                .into()
        }
        Advice::AnotherGeneration => "choose another one with --to".into(),
        // The others need no flag.
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engraft_runtime::ErrorKind;

    #[test]
    fn advice_names_flags_that_exist() {
        let all = [
            Advice::KeepLess,
            Advice::Batches { batch: 2, tokens: None, was: (4, 256), keep_less: true },
            Advice::Batches { batch: 1, tokens: Some(64), was: (4, 256), keep_less: false },
            Advice::SmallerAdapter { rank: 2, tokens: Some(64), keep_less: true },
            Advice::SmallerAdapter { rank: 7, tokens: None, keep_less: false },
            Advice::UpdateAtOnce,
            Advice::AdapterInstead { rank: 8, bytes: 1 << 20, fits: true, full_bytes: 1 << 30 },
            Advice::NothingFits { least: 1 << 20 },
            Advice::LessPreparation,
            Advice::LowerRate,
            Advice::LowerRateOrCheckpoints,
            Advice::ExactActivations,
            Advice::LowerRank,
            Advice::OwnBase,
            Advice::UseAsAdapter,
            Advice::JoinParts,
            Advice::ReadInstead,
            Advice::MapInstead,
            Advice::FewerExamplesOrMoreRows,
            Advice::FewerExamplesOrShorterRows,
            Advice::MaskPrompts,
            Advice::AnotherSplit,
            Advice::ShorterContext,
            Advice::SmallerModel,
            Advice::LongerContext,
            Advice::LongerRows,
            Advice::AnotherType,
            Advice::WithoutMagnitudes,
            Advice::AnotherGeneration,
        ];
        let command = crate::args::command();
        let flags: Vec<String> = command
            .get_subcommands()
            .flat_map(|verb| verb.get_subcommands().chain([verb]).flat_map(clap::Command::get_arguments))
            .filter_map(|flag| flag.get_long().map(|long| format!("--{long}")))
            .collect();
        for advice in all {
            let text = told(&Error::new(ErrorKind::Misuse, "It failed").advise(advice));
            assert!(text.starts_with("It failed; "), "{text}");
            for word in text.split([' ', ',', ';', ')', '(']).filter(|word| word.starts_with("--")) {
                let ours = word != "--merge`" && !flags.iter().any(|flag| flag == word);
                assert!(!ours || word.starts_with("--merge"), "{word} in {text}");
            }
        }
    }
}
