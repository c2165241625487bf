//! How to compute.

use std::sync::Arc;

use clap::{Args, value_parser};
use engraft_kernels::{Isa, Kernels};
use engraft_runtime::error::Error;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::nn::{GradientPrecision, Precision};
use engraft_runtime::run::Base;

use super::{misuse, parse};

/// How to compute.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Computing")]
pub(crate) struct ComputeOptions {
    /// Number of threads; it doesn't change results
    #[arg(short, long, value_name = "N", default_value_t = threads_default(), value_parser = value_parser!(u32).range(1..=256))]
    pub(crate) threads: u32,

    /// Precision of activations in products with quantized weights
    #[arg(long, default_value = "int8", value_parser = parse::precision())]
    pub(crate) precision: Precision,

    /// Precision of input gradients in training [default: as --precision]
    #[arg(long, value_parser = parse::gradient_precision())]
    pub(crate) gradient_precision: Option<GradientPrecision>,

    /// Use this instruction set instead of the best one (for testing)
    #[arg(long, value_parser = ISAS)]
    isa: Option<String>,
}

/// The instruction sets that the kernels can use, for every architecture, so that help is the same on all machines.
const ISAS: [&str; 8] = ["scalar", "portable", "avx2", "avxvnni", "avx512", "neon", "dotprod", "i8mm"];

impl ComputeOptions {
    /// The kernels for the requested instruction set, or for the best one.
    ///
    /// # Errors
    /// `Misuse` for an instruction set that this CPU or build lacks.
    pub(crate) fn kernels(&self) -> Result<Arc<Kernels>, Error> {
        let isa = match &self.isa {
            None => Isa::detect(),
            Some(asked) => Isa::from_name(asked).ok_or_else(|| {
                let here: Vec<_> = Isa::available().map(Isa::name).collect();
                misuse(format!("--isa {asked}: not available here; choose one of {}", here.join(", ")))
            })?,
        };
        let kernels = Kernels::with_isa(isa, self.threads as usize);
        log::info!("{} threads, {}", kernels.threads(), isa.name());
        Ok(Arc::new(kernels))
    }

    /// A model, and how to compute with it.
    ///
    /// # Errors
    /// Those of [`ComputeOptions::kernels`].
    pub(crate) fn base(&self, model: Arc<ModelFile>, held_bytes: usize) -> Result<Base, Error> {
        let (kernels, precision, gradient) = (self.kernels()?, self.precision, self.gradient());
        Ok(Base { model, kernels, precision, gradient, held_bytes })
    }

    /// How training computes input gradients.
    pub(crate) fn gradient(&self) -> GradientPrecision {
        self.gradient_precision.unwrap_or(self.precision.into())
    }
}

pub(crate) fn threads_default() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| n.get().min(256) as u32)
}
