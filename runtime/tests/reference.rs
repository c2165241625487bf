//! The referee itself, against float64 figures of real models and against finite differences.

use candle_core::quantized::gguf_file;
use candle_core::{Device, Tensor, Var};
use engraft_runtime::model::config::{ModelConfig, Proj};
use engraft_runtime::reference::{Lora, NO_TARGET, Reference, loss as loss_of};
use std::collections::HashMap;
use std::path::PathBuf;

type TestResult = Result<(), Box<dyn std::error::Error>>;

/// A file of the shared models, or `None` with a loud line where they are absent.
fn shared_model(name: &str) -> Option<PathBuf> {
    let root = std::env::var_os("ENGRAFT_SHARED")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared"), PathBuf::from);
    let path = root.join("models").join(name);
    if !path.exists() {
        eprintln!(
            "SKIPPED: {} is absent; set ENGRAFT_SHARED to the folder that holds models/",
            path.display()
        );
        return None;
    }
    Some(path)
}

/// Reads a llama GGUF through candle, dequantized.
fn load(path: &PathBuf) -> Result<(ModelConfig, HashMap<String, Tensor>), Box<dyn std::error::Error>> {
    let mut file = std::fs::File::open(path)?;
    let gguf = gguf_file::Content::read(&mut file)?;
    let int = |key: &str| -> candle_core::Result<usize> {
        let Some(value) = gguf.metadata.get(&format!("llama.{key}")) else {
            candle_core::bail!("no llama.{key}")
        };
        Ok(value.to_u32()? as usize)
    };
    let float = |key: &str, default: f32| {
        gguf.metadata.get(&format!("llama.{key}")).map_or(Ok(default), |value| value.to_f32())
    };
    let vocab = gguf.tensor_infos["token_embd.weight"].shape.dims()[0];
    let (d_model, n_heads) = (int("embedding_length")?, int("attention.head_count")?);
    let config = ModelConfig {
        architecture: "llama".into(),
        vocab,
        d_model,
        n_layers: int("block_count")?,
        n_heads,
        n_kv_heads: int("attention.head_count_kv")?,
        head_dim: d_model / n_heads,
        d_ff: int("feed_forward_length")?,
        rope_dim: int("rope.dimension_count")?,
        rope_base: float("rope.freq_base", 10_000.0)?,
        rope_scale: 1.0,
        rms_eps: float("attention.layer_norm_rms_epsilon", 1e-5)?,
        context_len: int("context_length")?,
        tied: !gguf.tensor_infos.contains_key("output.weight"),
    };
    let mut tensors = HashMap::new();
    for name in gguf.tensor_infos.keys() {
        tensors.insert(name.clone(), gguf.tensor(&mut file, name, &Device::Cpu)?.dequantize(&Device::Cpu)?);
    }
    Ok((config, tensors))
}

/// The largest difference from a model's recorded float64 logits, and from its mean NLL.
fn golden_error(model: &PathBuf, golden: &PathBuf, spoil: bool) -> Result<f64, Box<dyn std::error::Error>> {
    let (mut config, tensors) = load(model)?;
    if spoil {
        config.rope_base = 500.0;
    }
    let reference = Reference::new(&config, tensors, None)?;
    let mut worst = 0f64;
    let cases: Vec<serde_json::Value> = serde_json::from_str(&std::fs::read_to_string(golden)?)?;
    assert!(!cases.is_empty(), "{} holds no case", golden.display());
    for case in cases {
        let ids: Vec<u32> = serde_json::from_value(case["ids"].clone())?;
        let expected: Vec<f64> = serde_json::from_value(case["last_logits"].clone())?;
        let logits = reference.logits(None, &ids)?;
        let last: Vec<f32> = logits.get(ids.len() - 1)?.to_vec1()?;
        assert_eq!(last.len(), expected.len());
        for (got, want) in last.iter().zip(&expected) {
            worst = worst.max((f64::from(*got) - want).abs());
        }
        let mut targets = ids[1..].to_vec();
        targets.push(NO_TARGET);
        let nll = f64::from(loss_of(&logits, &targets)?.to_scalar::<f32>()?);
        let mean_nll = case["mean_nll"].as_f64().ok_or("a golden case has no mean_nll")?;
        worst = worst.max((nll - mean_nll).abs());
    }
    Ok(worst)
}

#[test]
fn logits_equal_the_float64_figures_of_real_models() -> TestResult {
    for (model, golden) in [
        ("stories260K/stories260K-f32.gguf", "stories260K/golden_logits.json"),
        ("babyllama/babyllama-tok361-f32.gguf", "babyllama/golden_logits_tok361.json"),
    ] {
        let (Some(model), Some(golden)) = (shared_model(model), shared_model(golden)) else { continue };
        let error = golden_error(&model, &golden, false)?;
        assert!(error < 1e-4, "{}: off by {error:e}", model.display());
        let spoiled = golden_error(&model, &golden, true)?;
        assert!(spoiled > 1e-2, "a wrong rope base went unnoticed ({spoiled:e})");
    }
    Ok(())
}

/// A tiny model of seeded noise: two blocks, grouped heads, a partial rotary dimension.
fn noise_model() -> candle_core::Result<(ModelConfig, HashMap<String, Tensor>)> {
    let config = ModelConfig {
        architecture: "llama".into(),
        vocab: 11,
        d_model: 16,
        n_layers: 2,
        n_heads: 4,
        n_kv_heads: 2,
        head_dim: 4,
        d_ff: 24,
        rope_dim: 2,
        rope_base: 100.0,
        rope_scale: 2.0,
        rms_eps: 1e-5,
        context_len: 32,
        tied: false,
    };
    let mut noise = Noise(7);
    let d = config.d_model;
    let mut tensors = HashMap::new();
    let mut put = |name: String, values: Vec<f32>, shape: &[usize]| -> candle_core::Result<()> {
        tensors.insert(format!("{name}.weight"), Tensor::from_vec(values, shape, &Device::Cpu)?);
        Ok(())
    };
    for layer in 0..config.n_layers {
        put(format!("blk.{layer}.attn_norm"), noise.vec(d, 0.2, 1.0), &[d])?;
        put(format!("blk.{layer}.ffn_norm"), noise.vec(d, 0.2, 1.0), &[d])?;
        for p in Proj::ALL {
            let (out, inp) = p.shape(&config);
            put(format!("blk.{layer}.{}", p.gguf_name()), noise.vec(out * inp, 0.5, 0.0), &[out, inp])?;
        }
    }
    put("token_embd".into(), noise.vec(11 * d, 1.0, 0.0), &[11, d])?;
    put("output".into(), noise.vec(11 * d, 0.5, 0.0), &[11, d])?;
    put("output_norm".into(), noise.vec(d, 0.2, 1.0), &[d])?;
    Ok((config, tensors))
}

/// The referee of [`noise_model`], whose rotary frequencies have a divisor.
fn noise_reference() -> candle_core::Result<(ModelConfig, Reference)> {
    let (config, tensors) = noise_model()?;
    let reference = Reference::new(&config, tensors, Some(vec![1.5]))?;
    Ok((config, reference))
}

/// Seeded uniform noise (xorshift64).
struct Noise(u64);

impl Noise {
    fn vec(&mut self, n: usize, amplitude: f32, centre: f32) -> Vec<f32> {
        (0..n).map(|_| centre + amplitude * self.uniform()).collect()
    }

    fn uniform(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

const IDS: [u32; 9] = [3, 1, 4, 1, 5, 9, 2, 6, 10];
const TARGETS: [u32; 9] = [NO_TARGET, 4, 1, NO_TARGET, 9, 2, 6, 10, NO_TARGET];

#[test]
fn lora_gradients_equal_finite_differences() -> TestResult {
    let (config, reference) = noise_reference()?;
    let mut noise = Noise(11);
    for p in Proj::ALL {
        let (out, inp) = p.shape(&config);
        let a = Var::from_vec(noise.vec(3 * inp, 0.3, 0.0), (3, inp), &Device::Cpu)?;
        let b = Var::from_vec(noise.vec(out * 3, 0.3, 0.0), (out, 3), &Device::Cpu)?;
        let loss = |a: &Tensor, b: &Tensor| -> candle_core::Result<Tensor> {
            let pairs = [((1, p), (a.clone(), b.clone()))].into_iter().collect();
            let lora = Lora { scale: 2.0, pairs, ..Lora::default() };
            loss_of(&reference.logits(Some(&lora), &IDS)?, &TARGETS)
        };
        let grads = loss(a.as_tensor(), b.as_tensor())?.backward()?;
        for (which, var) in [("A", &a), ("B", &b)] {
            // Along the gradient itself the difference quotient is |g|, far above f32 rounding.
            let grad = grads.get(var.as_tensor()).ok_or("no gradient")?;
            let norm = f64::from(grad.sqr()?.sum_all()?.to_scalar::<f32>()?).sqrt();
            assert!(norm > 1e-3, "{p:?} {which}: gradient vanishes ({norm:e})");
            let step = 1e-2;
            let at = |sign: f64| -> candle_core::Result<f64> {
                let moved = (var.as_tensor() + (grad * (sign * step / norm))?)?;
                let (a, b) = if which == "A" { (&moved, b.as_tensor()) } else { (a.as_tensor(), &moved) };
                Ok(f64::from(loss(a, b)?.to_scalar::<f32>()?))
            };
            let slope = (at(1.0)? - at(-1.0)?) / (2.0 * step);
            assert!((slope / norm - 1.0).abs() < 1e-2, "{p:?} {which}: slope {slope}, gradient {norm}");
        }
    }
    Ok(())
}

#[test]
fn every_weight_gets_a_gradient() -> TestResult {
    let (config, mut tensors) = noise_model()?;
    let mut vars = Vec::new();
    for tensor in tensors.values_mut() {
        let var = Var::from_tensor(tensor)?;
        *tensor = var.as_tensor().clone();
        vars.push(var);
    }
    let reference = Reference::new(&config, tensors, Some(vec![1.5]))?;
    let loss = loss_of(&reference.logits(None, &IDS)?, &TARGETS)?;
    let grads = loss.backward()?;
    for (i, var) in vars.iter().enumerate() {
        let grad = grads.get(var.as_tensor()).ok_or_else(|| format!("weight {i} has no gradient"))?;
        assert!(grad.abs()?.sum_all()?.to_scalar::<f32>()? > 1e-4, "weight {i}: gradient is zero");
    }
    Ok(())
}

#[test]
fn padding_on_the_right_changes_nothing() -> TestResult {
    let (_, reference) = noise_reference()?;
    let alone = reference.logits(None, &IDS[..4])?;
    let mut padded = IDS[..4].to_vec();
    padded.extend([0; 5]);
    let batch = Tensor::from_vec([IDS.to_vec(), padded].concat(), (2, 9), &Device::Cpu)?;
    let together = reference.logits_batch(None, &batch)?.get(1)?.narrow(0, 0, 4)?;
    let worst: f32 = (alone - together)?.abs()?.max_all()?.to_scalar()?;
    assert!(worst < 1e-5, "off by {worst:e}");
    Ok(())
}

#[test]
fn ill_fitting_input_is_an_error() -> TestResult {
    let (_, reference) = noise_reference()?;
    assert!(reference.logits(None, &[11]).is_err(), "an id outside the vocabulary");
    let logits = reference.logits(None, &IDS)?;
    assert!(loss_of(&logits, &[NO_TARGET; 9]).is_err(), "no target at all");
    assert!(loss_of(&logits, &[1; 8]).is_err(), "a target too few");
    Ok(())
}
