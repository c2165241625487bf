//! How words on the command line become values, and the errors for those that can't.

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use engraft_kernels::DType;
use engraft_runtime::adapter::foreign::Format;
use engraft_runtime::adapter::{Override, StoredAs};
use engraft_runtime::compare::answers::Metric;
use engraft_runtime::gate::task::Task;
use engraft_runtime::gate::verdict::KeepGeneral;
use engraft_runtime::generate::KvType;
use engraft_runtime::model::Proj;
use engraft_runtime::nn::keep::{Keep, KeepPrecision};
use engraft_runtime::nn::{GradientPrecision, Precision};
use engraft_runtime::run::KeepChoice;
use engraft_runtime::train::Direction;
use engraft_runtime::train::schedule::Shape;

/// One of several values, each with a name and a help text.
fn choice<T: Copy + Send + Sync + 'static>(
    all: &'static [(T, &'static str, &'static str)],
) -> impl TypedValueParser<Value = T> {
    let named = all.iter().map(|(_, name, help)| PossibleValue::new(*name).help(*help));
    PossibleValuesParser::new(named.collect::<Vec<_>>()).map(|word| {
        let found = all.iter().find(|(_, name, _)| *name == word);
        found.expect("one of the possible values").0
    })
}

/// Precision of activations in products with quantized weights.
pub(crate) fn precision() -> impl TypedValueParser<Value = Precision> {
    choice(&[
        (Precision::Int8, "int8", "Quantized to 8 bits per block of 32, as llama.cpp does: the fast path"),
        (Precision::F32, "f32", "Not rounded"),
    ])
}

/// Precision of input gradients in training.
pub(crate) fn gradient_precision() -> impl TypedValueParser<Value = GradientPrecision> {
    choice(&[
        (
            GradientPrecision::Int8,
            "int8",
            "Gradients and weights quantized to 8 bits per block of 32: the fast path",
        ),
        (
            GradientPrecision::Bf16,
            "bf16",
            "Both rounded to bf16 if the CPU multiplies it (AVX-512 BF16, Armv8.6); otherwise f32",
        ),
        (GradientPrecision::F32, "f32", "Not rounded"),
    ])
}

/// How blocks keep values for the backward pass.
pub(crate) fn keep_precision() -> impl TypedValueParser<Value = KeepPrecision> {
    choice(&[
        (KeepPrecision::F32, "f32", "Not rounded: gradients don't change"),
        (KeepPrecision::Bf16, "bf16", "Rounded, in half the memory"),
    ])
}

/// What blocks keep for the backward pass: memory against time.
pub(crate) fn keep() -> impl TypedValueParser<Value = KeepChoice> {
    choice(&[
        (
            KeepChoice::Auto,
            "auto",
            "The fastest choice within --memory-budget, or within 128 MiB without one",
        ),
        (KeepChoice::Fixed(Keep::Inputs), "inputs", "Only their inputs: the least memory"),
        (KeepChoice::Fixed(Keep::Attention), "attention", "Also the results of their attention half"),
        (KeepChoice::Fixed(Keep::All), "all", "Everything: the fastest"),
    ])
}

/// The course of the learning rate after the warmup.
pub(crate) fn schedule() -> impl TypedValueParser<Value = Shape> {
    choice(&[
        (Shape::Constant, "constant", "Stays the same"),
        (Shape::Linear, "linear", "Falls to zero in a straight line"),
        (Shape::Cosine, "cosine", "Falls to zero along half a cosine"),
    ])
}

/// The direction of the divergence from the base.
pub(crate) fn kl_direction() -> impl TypedValueParser<Value = Direction> {
    choice(&[
        (Direction::Forward, "forward", "KL(base‖tuned): what was likely stays likely"),
        (Direction::Reverse, "reverse", "KL(tuned‖base): what was unlikely stays unlikely"),
    ])
}

/// A task with numeric answers.
pub(crate) fn task() -> impl TypedValueParser<Value = Task> {
    choice(&[
        (Task::Gsm8k, "gsm8k", "Grade-school mathematics, answers after ####"),
        (Task::OrcaMath, "orca-math", "Word problems, answers in prose"),
        (Task::Svamp, "svamp", "One-step word problems"),
    ])
}

/// How to compare answers with the reference for rows without a task.
pub(crate) fn metric() -> impl TypedValueParser<Value = Metric> {
    choice(&[
        (Metric::Exact, "exact", "Word for word, except for white space"),
        (Metric::Json, "json", "As JSON, all fields equal"),
    ])
}

/// How to compare answers to retention rows with the reference.
pub(crate) fn retention_metric() -> impl TypedValueParser<Value = Metric> {
    choice(&[
        (Metric::Exact, "exact", "Word for word, except for white space"),
        (Metric::Json, "json", "As JSON, all fields equal"),
        (Metric::Numeric(Task::Gsm8k), "gsm8k", "By number, as --task gsm8k"),
        (Metric::Numeric(Task::OrcaMath), "orca-math", "By number, as --task orca-math"),
        (Metric::Numeric(Task::Svamp), "svamp", "By number, as --task svamp"),
    ])
}

/// How much of ordinary text must be kept.
pub(crate) fn keep_general() -> impl TypedValueParser<Value = KeepGeneral> {
    choice(&[
        (KeepGeneral::Strict, "strict", "It may get 3 % worse (0.03 nats per token): nobody would notice"),
        (KeepGeneral::Moderate, "moderate", "It may get 10 % worse (0.1 nats): noticeable, for harder tasks"),
        (KeepGeneral::Off, "off", "It is measured and not judged: for a model that only ever does this task"),
    ])
}

/// How to store an adapter's numbers.
pub(crate) fn stored_as() -> impl TypedValueParser<Value = StoredAs> {
    choice(&[
        (StoredAs::F32, "f32", "Exact"),
        (StoredAs::F16, "f16", "Rounded to 11 significant bits, at half the size"),
    ])
}

/// How the key/value cache stores its elements.
pub(crate) fn cache_type() -> impl TypedValueParser<Value = KvType> {
    choice(&[
        (KvType::F32, "f32", "4 bytes per element, exact"),
        (KvType::F16, "f16", "2 bytes per element"),
        (KvType::Q8, "q8", "8 bits in blocks of 32, for long contexts"),
    ])
}

/// Another tool's format of adapters to write.
pub(crate) fn format() -> impl TypedValueParser<Value = Format> {
    choice(&[
        (Format::Peft, "peft", "A folder for PEFT"),
        (Format::Mlx, "mlx", "A folder for mlx_lm"),
        (Format::Gguf, "gguf", "A file for llama.cpp"),
    ])
}

/// Parses a finite number that obeys a rule.
fn number(text: &str, rule: &str, holds: impl Fn(f64) -> bool) -> Result<f64, String> {
    let value: f64 = text.trim().parse().map_err(|_| format!("must be a number {rule}"))?;
    if value.is_finite() && holds(value) { Ok(value) } else { Err(format!("must be a number {rule}")) }
}

pub(crate) fn positive(text: &str) -> Result<f64, String> {
    number(text, "above 0", |v| v > 0.0)
}

/// Parses a number that is still positive as f32.
pub(crate) fn positive_f32(text: &str) -> Result<f32, String> {
    Ok(number(text, "above 0 and at most 1e6", |v| v as f32 > 0.0 && v <= 1e6)? as f32)
}

pub(crate) fn not_negative(text: &str) -> Result<f64, String> {
    number(text, "of at least 0", |v| v >= 0.0)
}

pub(crate) fn not_negative_f32(text: &str) -> Result<f32, String> {
    Ok(number(text, "of 0 to 1e6", |v| (0.0..=1e6).contains(&v))? as f32)
}

pub(crate) fn below_one(text: &str) -> Result<f64, String> {
    number(text, "of at least 0 and below 1", |v| (0.0..1.0).contains(&v))
}

pub(crate) fn replay_share(text: &str) -> Result<f64, String> {
    number(text, "of 0 to 0.9", |v| (0.0..=0.9).contains(&v))
}

pub(crate) fn kl_weight(text: &str) -> Result<f32, String> {
    Ok(number(text, "of 0 to 1e6", |v| v == 0.0 || v as f32 > 0.0 && v <= 1e6)? as f32)
}

/// Parses a number of turns, 0 for none.
pub(crate) fn folds(text: &str) -> Result<u32, String> {
    let turns =
        number(text, "of 2 to 20, or 0", |v| v == 0.0 || (2.0..=20.0).contains(&v) && v.fract() == 0.0)?;
    Ok(turns as u32)
}

/// Parses a seed; -1 draws one.
pub(crate) fn seed(text: &str) -> Result<u64, String> {
    if text == "-1" {
        use std::hash::{BuildHasher, RandomState};
        return Ok(RandomState::new().hash_one(0u8));
    }
    text.parse().map_err(|_| "must be a whole number of at least 0, or -1 for a new one each time".into())
}

/// Parses a type by ggml's name.
pub(crate) fn dtype(text: &str) -> Result<DType, String> {
    let named = DType::ALL.into_iter().find(|t| t.name().eq_ignore_ascii_case(text));
    named.ok_or_else(|| format!("must be one of {}", DType::ALL.map(DType::name).join(", ")))
}

/// The transformer blocks to adapt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layers {
    All,
    /// The last N blocks, at least one.
    Last(u32),
}

pub(crate) fn layers(text: &str) -> Result<Layers, String> {
    match text.parse::<i64>() {
        Ok(-1) => Ok(Layers::All),
        Ok(n @ 1..=65_536) => Ok(Layers::Last(n as u32)),
        _ => Err("must be a number of blocks, at least 1, or -1 for all".into()),
    }
}

/// The projections to adapt: at least one, in storage order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Modules(pub(crate) Vec<Proj>);

pub(crate) fn modules(text: &str) -> Result<Modules, String> {
    if ["all", "all-linear"].contains(&text) {
        return Ok(Modules(Proj::ALL.to_vec()));
    }
    let named = |name: &str| {
        let last = name.trim().rsplit('.').next().unwrap_or_default();
        Proj::from_name(last).ok_or_else(|| {
            format!("`{}` isn't a projection; use all, or a list of q, k, v, o, gate, up, down", name.trim())
        })
    };
    let mut found = text.split(',').map(named).collect::<Result<Vec<_>, _>>()?;
    found.sort();
    found.dedup();
    Ok(Modules(found))
}

/// A projection in one layer, or in all layers if none is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    layer: Option<usize>,
    proj: Proj,
}

impl Place {
    pub(super) fn of(self, rank: Option<usize>, alpha: Option<f32>) -> Override {
        Override { layer: self.layer, proj: self.proj, rank, alpha }
    }
}

/// Values for single projections.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Pattern<T>(pub(super) Vec<(Place, T)>);

pub(crate) fn ranks(text: &str) -> Result<Pattern<u32>, String> {
    pattern(text, |value| value.parse().ok().filter(|r| (1..=256).contains(r)).ok_or("a rank of 1 to 256"))
}

pub(crate) fn alphas(text: &str) -> Result<Pattern<f32>, String> {
    pattern(text, |value| positive_f32(value).map_err(|_| "an alpha above 0 and at most 1e6"))
}

/// Parses a list of PLACE=VALUE. A place is a projection, or a path with its layer as in PEFT's patterns.
fn pattern<T>(text: &str, value: impl Fn(&str) -> Result<T, &'static str>) -> Result<Pattern<T>, String> {
    let entry = |entry: &str| {
        let form = || format!("`{entry}` must be PLACE=VALUE, such as q=4 or layers.3.q=4");
        let (path, number) = entry.split_once('=').ok_or_else(form)?;
        let mut words = path.trim().split('.').rev();
        let proj = words.next().and_then(Proj::from_name).ok_or_else(form)?;
        let words: Vec<_> = words.collect();
        // The words are reversed, so the layer's number comes before the word `layers`.
        let layer = match words.iter().position(|w| *w == "layers") {
            Some(at) => {
                let number = at.checked_sub(1).and_then(|i| words[i].parse().ok());
                Some(number.ok_or_else(form)?)
            }
            None if words.iter().all(|w| ["self_attn", "mlp"].contains(w)) => None,
            None => return Err(form()),
        };
        let number = value(number.trim()).map_err(|wanted| format!("`{entry}`: {wanted} is needed"))?;
        Ok((Place { layer, proj }, number))
    };
    let entries = text.split(',').map(str::trim).filter(|e| !e.is_empty());
    Ok(Pattern(entries.map(entry).collect::<Result<_, String>>()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_take_every_naming() {
        let all = Modules(Proj::ALL.to_vec());
        assert_eq!(modules("all").unwrap(), all);
        assert_eq!(modules("q,k,v,o,gate,up,down").unwrap(), all);
        assert_eq!(
            modules("mlp.down_proj, self_attn.q_proj,attn_q").unwrap(),
            Modules(vec![Proj::Q, Proj::Down])
        );
        assert!(modules("").is_err() && modules("q,,v").is_err());
    }

    #[test]
    fn patterns_name_projections_and_layers() {
        let place = |layer, proj| Place { layer, proj };
        let parsed = ranks("q=4, layers.3.mlp.down_proj=16,model.layers.12.self_attn.v_proj=1").unwrap();
        let expected =
            vec![(place(None, Proj::Q), 4), (place(Some(3), Proj::Down), 16), (place(Some(12), Proj::V), 1)];
        assert_eq!(parsed, Pattern(expected));
        assert_eq!(alphas("").unwrap(), Pattern(vec![]));
        assert_eq!(alphas("gate=0.5").unwrap(), Pattern(vec![(place(None, Proj::Gate), 0.5)]));
        for bad in ["q", "q=", "q=0", "q=257", "x=4", "layers.q=4", "layers.x.q=4", "3.q=4", "q=4=5", "=4"] {
            assert!(ranks(bad).is_err(), "{bad}");
        }
        assert!(alphas("q=nan").is_err() && alphas("q=0").is_err());
    }

    #[test]
    fn layers_and_seeds() {
        assert_eq!(layers("-1"), Ok(Layers::All));
        assert_eq!(layers("4"), Ok(Layers::Last(4)));
        assert!(layers("0").is_err() && layers("-2").is_err() && layers("x").is_err());
        assert_eq!(seed("7"), Ok(7));
        assert!(seed("-2").is_err());
        assert_ne!(seed("-1"), seed("-1"));
    }
}
