//! An adapter in a neutral form: every module with its own rank and alpha, whichever tool wrote it.
//!
//! The rows of B and of the magnitudes follow the *base file's* order. Readers and writers of formats in
//! Hugging Face's order go through [`RowOrder`], which knows the one difference: a GGUF of architecture `llama`
//! permutes the rows of q and k within each head so that rotary pairs are adjacent.

use super::config::{Layout, LoraConfig, Override, check_alpha, check_rank};
use super::params::{Adapter, BaseIdentity, Init, TrainedWith};
use crate::error::{Error, ErrorKind, Result};
use crate::model::gguf::quote;
use crate::model::{ModelConfig, Proj};

/// The adapter of one projection.
#[derive(Clone, Debug, PartialEq)]
pub struct Module {
    /// Transformer block.
    pub layer: usize,
    /// Projection within the block.
    pub proj: Proj,
    /// Rank r.
    pub rank: usize,
    /// Alpha; the multiplier follows from it and [`Exchange::rslora`].
    pub alpha: f32,
    /// A, `[r, in]` row-major.
    pub a: Vec<f32>,
    /// B, `[out, r]` row-major, rows as the base file has them.
    pub b: Vec<f32>,
    /// DoRA's magnitudes, `[out]`, as the rows of B.
    pub magnitude: Option<Vec<f32>>,
}

/// A whole adapter, independent of any file format.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Exchange {
    /// Whether the multiplier is alpha/√r instead of alpha/r.
    pub rslora: bool,
    /// Whether modules carry magnitudes.
    pub dora: bool,
    /// How A was initialized.
    pub init: Init,
    /// Dropout it was trained with.
    pub dropout: f32,
    /// The base's name as the adapter gives it; empty if it gives none.
    pub base_name: String,
    /// The modules, in the order of layers, then of [`Proj::ALL`], each once.
    pub modules: Vec<Module>,
}

impl Exchange {
    /// The multiplier of a module's product.
    pub fn scale(&self, module: &Module) -> f32 {
        let r = module.rank as f32;
        module.alpha / if self.rslora { r.sqrt() } else { r }
    }

    /// Puts the modules into their order and checks them against a model: at least one, each once,
    /// ranks in 1 to [`super::RANK_MAX`], shapes that match the model, every number finite, and magnitudes exactly if
    /// `dora` is set.
    ///
    /// # Errors
    /// `BaseMismatch` for layers or shapes the model doesn't have, `Corrupt` for the rest.
    pub fn check(&mut self, model: &ModelConfig) -> Result<()> {
        self.modules.sort_by_key(|m| (m.layer, m.proj));
        if self.modules.is_empty() {
            return Err(corrupt("it adapts nothing: it holds no pair of A and B"));
        }
        if let Some([m, _]) = self.modules.array_windows().find(|[a, b]| at(a) == at(b)) {
            return Err(corrupt(format!("{} is adapted twice", name(m))));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(corrupt(format!("dropout {} must be at least 0 and below 1", self.dropout)));
        }
        for m in &self.modules {
            check_module(m, model, self.dora).map_err(|e| e.at(name(m)))?;
        }
        Ok(())
    }
}

fn at(m: &Module) -> (usize, Proj) {
    (m.layer, m.proj)
}

/// The module's name for messages, as Hugging Face has it.
pub(super) fn name(m: &Module) -> String {
    format!("layers.{}.{}", m.layer, m.proj.hf_name())
}

fn check_module(m: &Module, model: &ModelConfig, dora: bool) -> Result<()> {
    let mismatch = |problem| Err(Error::new(ErrorKind::BaseMismatch, problem));
    if m.layer >= model.n_layers {
        return mismatch(format!(
            "the model's layers are 0 to {}; use the adapter's own base",
            model.n_layers - 1
        ));
    }
    check_rank(m.rank).and_then(|()| check_alpha(m.alpha)).map_err(corrupt)?;
    let (outputs, inputs) = m.proj.shape(model);
    if (m.a.len(), m.b.len()) != (m.rank * inputs, outputs * m.rank) {
        return mismatch(format!(
            "A of {} and B of {} numbers at rank {}, where the model's projection is {outputs} x {inputs}; \
             use the adapter's own base",
            m.a.len(),
            m.b.len(),
            m.rank
        ));
    }
    let magnitude = m.magnitude.as_deref();
    if magnitude.is_some() != dora {
        let problem = if dora { "DoRA without magnitudes" } else { "magnitudes, but no DoRA" };
        return Err(corrupt(problem));
    }
    if magnitude.is_some_and(|m| m.len() != outputs) {
        return mismatch(format!("the magnitudes' length is not {outputs}"));
    }
    for (part, values) in [("A", &m.a[..]), ("B", &m.b), ("its magnitudes", magnitude.unwrap_or_default())] {
        if let Some(i) = values.iter().position(|v| !v.is_finite()) {
            return Err(corrupt(format!("number {i} of {part} is {}: the adapter is broken", values[i])));
        }
    }
    Ok(())
}

/// An error in a foreign file's content.
pub(super) fn corrupt(problem: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, problem)
}

/// An error for a foreign file's unsupported request.
pub(super) fn unsupported(problem: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unsupported, problem)
}

/// The settings that describe an exchange's modules: the first module's for all, plus an override for each one
/// that differs.
fn settings(exchange: &Exchange) -> Result<LoraConfig> {
    let modules = &exchange.modules;
    let first = modules.first().ok_or_else(|| corrupt("it adapts nothing"))?;
    let mut layers: Vec<_> = modules.iter().map(|m| m.layer).collect();
    layers.dedup();
    let targets: Vec<_> = modules.iter().filter(|m| m.layer == first.layer).map(|m| m.proj).collect();
    for layer in &layers {
        if !modules.iter().filter(|m| m.layer == *layer).map(|m| &m.proj).eq(&targets) {
            return Err(unsupported(format!(
                "layers {} and {layer} adapt different projections; every adapted layer must adapt the same ones",
                first.layer
            )));
        }
    }
    let differs = |m: &&Module| m.rank != first.rank || m.alpha.to_bits() != first.alpha.to_bits();
    let overrides = modules.iter().filter(differs).map(|m| Override {
        layer: Some(m.layer),
        proj: m.proj,
        rank: Some(m.rank),
        alpha: Some(m.alpha),
    });
    Ok(LoraConfig {
        rank: first.rank,
        alpha: first.alpha,
        dropout: exchange.dropout,
        targets,
        layers,
        rslora: exchange.rslora,
        dora: exchange.dora,
        overrides: overrides.collect(),
    })
}

impl Adapter {
    /// The adapter an exchange describes, bound to the base with this digest. Foreign formats name no base that
    /// could be checked, so importing binds it.
    ///
    /// # Errors
    /// Those of [`Exchange::check`]; `Unsupported` for what an adapter can't hold.
    pub fn from_exchange(
        model: &ModelConfig,
        base_digest: [u8; 32],
        mut exchange: Exchange,
    ) -> Result<Adapter> {
        exchange.check(model)?;
        let config = settings(&exchange)?.checked(model).map_err(|e| corrupt(e.message()))?;
        let layout = Layout::new(model, &config);
        let mut theta = vec![0.0; layout.len()];
        for ((_, _, slot), m) in layout.slots().zip(&exchange.modules) {
            theta[slot.a].copy_from_slice(&m.a);
            transpose(&m.b, slot.rank, &mut theta[slot.b]);
            theta[slot.m].copy_from_slice(m.magnitude.as_deref().unwrap_or_default());
        }
        let meta =
            TrainedWith { base_name: exchange.base_name, init: exchange.init, ..TrainedWith::default() };
        let base = BaseIdentity::new(base_digest, model);
        Ok(Adapter { config, layout, theta, base, meta, binding: None })
    }

    /// The adapter in neutral form.
    pub fn to_exchange(&self) -> Exchange {
        let module = |(layer, proj, slot): (usize, Proj, super::Slot)| {
            let mut b = vec![0.0; slot.b.len()];
            transpose(&self.theta[slot.b], slot.outputs, &mut b);
            let a = self.theta[slot.a].to_vec();
            let magnitude = self.config.dora.then(|| self.theta[slot.m].to_vec());
            Module { layer, proj, rank: slot.rank, alpha: self.config.alpha_of(layer, proj), a, b, magnitude }
        };
        Exchange {
            rslora: self.config.rslora,
            dora: self.config.dora,
            init: self.meta.init,
            dropout: self.config.dropout,
            base_name: self.meta.base_name.clone(),
            modules: self.layout.slots().map(module).collect(),
        }
    }
}

/// Writes the transpose of a row-major matrix of `cols` columns.
pub(super) fn transpose(from: &[f32], cols: usize, to: &mut [f32]) {
    let rows = from.len() / cols;
    for (i, row) in from.chunks_exact(cols).enumerate() {
        for (j, v) in row.iter().enumerate() {
            to[j * rows + i] = *v;
        }
    }
}

/// The order of a projection's rows: Hugging Face's against the base file's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowOrder {
    /// Rows of a head, if they are permuted.
    head: Option<usize>,
}

impl RowOrder {
    /// The order for a projection of a model. Of the architectures common converters write, only `llama`
    /// permutes (Qwen2, Qwen3 and Gemma don't).
    pub fn of(model: &ModelConfig, proj: Proj) -> RowOrder {
        let permuted = model.architecture == "llama" && matches!(proj, Proj::Q | Proj::K);
        RowOrder { head: permuted.then_some(model.head_dim) }
    }

    /// The Hugging Face row that corresponds to row `row` of the base file.
    pub fn hf_row(self, row: usize) -> usize {
        let Some(n) = self.head else { return row };
        let k = row % n;
        row - k + (k % 2) * (n / 2) + k / 2
    }

    /// Reorders rows of `width` from Hugging Face's order to the base file's.
    pub fn from_hf(self, hf: &[f32], width: usize) -> Vec<f32> {
        self.reorder(hf, width, |out, row| (out, row))
    }

    /// Reorders rows of `width` from the base file's order to Hugging Face's.
    pub fn to_hf(self, base: &[f32], width: usize) -> Vec<f32> {
        self.reorder(base, width, |out, row| (row, out))
    }

    /// Copies row by row; `way` maps (base row, its Hugging Face row) to (to, from). Rows that end within a
    /// head belong to another model: they stay as they are, and [`Exchange::check`] refuses them.
    fn reorder(self, from: &[f32], width: usize, way: impl Fn(usize, usize) -> (usize, usize)) -> Vec<f32> {
        let rows = from.len() / width;
        if self.head.is_some_and(|head| !rows.is_multiple_of(head)) {
            return from.to_vec();
        }
        let mut out = vec![0.0; from.len()];
        for row in 0..rows {
            let (to, source) = way(row, self.hf_row(row));
            out[to * width..(to + 1) * width].copy_from_slice(&from[source * width..(source + 1) * width]);
        }
        out
    }
}

/// Modules under construction: the parts of a file, gathered by name.
#[derive(Default)]
pub(super) struct Parts {
    found: std::collections::BTreeMap<(usize, Proj), [Option<Matrix>; 3]>,
}

/// A matrix of a file: row-major, with the extents that the file gives it.
pub(super) struct Matrix {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) values: Vec<f32>,
}

/// Which part of a module a tensor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    A,
    B,
    Magnitude,
}

impl Parts {
    /// Takes a tensor in.
    ///
    /// # Errors
    /// `Corrupt` if another tensor already took its place.
    pub(super) fn put(&mut self, module: (usize, Proj), part: Part, matrix: Matrix) -> Result<()> {
        let slot = &mut self.found.entry(module).or_default()[part as usize];
        match slot.replace(matrix) {
            None => Ok(()),
            Some(_) => {
                Err(corrupt(format!("{part:?} of layers.{}.{} occurs twice", module.0, module.1.hf_name())))
            }
        }
    }

    /// The modules' names so far.
    pub(super) fn names(&self) -> impl Iterator<Item = (usize, Proj)> + '_ {
        self.found.keys().copied()
    }

    /// Whether a module has arrived.
    pub(super) fn has(&self, module: (usize, Proj)) -> bool {
        self.found.contains_key(&module)
    }

    /// Pairs A with B. Matrices are `[r, in]`, `[out, r]` and `[out]` or `[1, out]`; `alpha` gives a module's
    /// alpha from its rank; `rows` gives the file's row order where it differs from the base's.
    ///
    /// # Errors
    /// `Corrupt` for half a pair, or a pair whose ranks differ; those of `alpha`.
    pub(super) fn modules(
        self,
        rows: impl Fn(Proj) -> Option<RowOrder>,
        mut alpha: impl FnMut(usize, Proj, usize) -> Result<f32>,
    ) -> Result<Vec<Module>> {
        let mut modules = Vec::with_capacity(self.found.len());
        for ((layer, proj), [a, b, magnitude]) in self.found {
            let place = format!("layers.{layer}.{}", proj.hf_name());
            let (a, b) = match (a, b) {
                (Some(a), Some(b)) => (a, b),
                (None, _) => return Err(corrupt(format!("{place}: A is missing"))),
                (_, None) => return Err(corrupt(format!("{place}: B is missing"))),
            };
            if a.rows != b.cols {
                let problem = format!("{place}: A has rank {}, B has rank {}", a.rows, b.cols);
                return Err(corrupt(problem));
            }
            check_rank(a.rows).map_err(|problem| corrupt(format!("{place}: {problem}")))?;
            let reorder = |values: Vec<f32>, width| {
                rows(proj).map_or_else(|| values.clone(), |r| r.from_hf(&values, width))
            };
            modules.push(Module {
                layer,
                proj,
                rank: a.rows,
                alpha: alpha(layer, proj, a.rows)?,
                a: a.values,
                b: reorder(b.values, b.cols),
                magnitude: magnitude.map(|m| reorder(m.values, 1)),
            });
        }
        Ok(modules)
    }
}

/// The module that a Hugging Face name stands for: `[model.]layers.N.self_attn.q_proj` and so on.
pub(super) fn module_of(path: &str) -> Option<(usize, Proj)> {
    let rest = path.strip_prefix("model.").unwrap_or(path).strip_prefix("layers.")?;
    let (layer, rest) = rest.split_once('.')?;
    let (room, proj) = rest.split_once('.')?;
    let proj = Proj::ALL.into_iter().find(|p| p.hf_name() == proj)?;
    (room == room_of(proj)).then_some((layer_of(layer)?, proj))
}

/// A layer's number, in its one spelling.
pub(super) fn layer_of(digits: &str) -> Option<usize> {
    digits.parse().ok().filter(|layer: &usize| layer.to_string() == digits)
}

/// The part of a layer that a projection belongs to, as Hugging Face has it.
fn room_of(proj: Proj) -> &'static str {
    if matches!(proj, Proj::Gate | Proj::Up | Proj::Down) { "mlp" } else { "self_attn" }
}

/// The Hugging Face name of a module.
pub(super) fn hf_path(layer: usize, proj: Proj) -> String {
    format!("model.layers.{layer}.{}", hf_path_in_block(proj))
}

/// The same within its block.
pub(super) fn hf_path_in_block(proj: Proj) -> String {
    format!("{}.{}", room_of(proj), proj.hf_name())
}

/// The error for a tensor that has no place in an adapter here.
pub(super) fn unknown_tensor(tensor: &str) -> Error {
    unsupported(format!(
        "tensor {} isn't part of a LoRA pair on q, k, v, o, gate, up or down; \
             ignoring it would load a different adapter",
        quote(tensor)
    ))
}
