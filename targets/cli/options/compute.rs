//! How to compute.

use std::sync::Arc;

use clap::{Args, ValueEnum, value_parser};
use engraft_kernels::{Isa as Available, Kernels};
use engraft_runtime::error::Error;
use engraft_runtime::nn::{GradientPrecision, Precision};

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
    #[arg(long, value_enum)]
    isa: Option<Isa>,
}

/// The instruction sets that the kernels can use, for every architecture, so that help is the same on all machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Isa {
    Scalar,
    Portable,
    Avx2,
    #[value(name = "avxvnni")]
    AvxVnni,
    Avx512,
    Neon,
    Dotprod,
    I8mm,
}

impl ComputeOptions {
    /// The kernels for the requested instruction set, or for the best one.
    ///
    /// # Errors
    /// `Misuse` for an instruction set that this CPU or build lacks.
    pub(crate) fn kernels(&self) -> Result<Arc<Kernels>, Error> {
        let isa = match self.isa.and_then(|isa| isa.to_possible_value()) {
            None => Available::detect(),
            Some(asked) => Available::from_name(asked.get_name()).ok_or_else(|| {
                let here: Vec<_> = Available::available().map(Available::name).collect();
                misuse(format!(
                    "--isa {}: not available here; choose one of {}",
                    asked.get_name(),
                    here.join(", ")
                ))
            })?,
        };
        let kernels = Kernels::with_isa(isa, self.threads as usize);
        log::info!("{} threads, {}", kernels.threads(), isa.name());
        Ok(Arc::new(kernels))
    }

    /// How training computes input gradients.
    pub(crate) fn gradient(&self) -> GradientPrecision {
        self.gradient_precision.unwrap_or(self.precision.into())
    }
}

pub(crate) fn threads_default() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| n.get().min(256) as u32)
}
