//! `engraft plan`: the memory that a training run will take.

use anyhow::Result;
use clap::Args;
use clap::builder::PossibleValuesParser;
use engraft_runtime::train::calibrate::calibrate;

use super::Invocation;
use super::prepare::{chosen_rate, ladder_table, prepare, room_of};
use crate::json;
use crate::options::TuneOptions;
use crate::provenance::{self, PROFILES};

#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) tune: TuneOptions,

    /// Don't time this machine: faster, but the table has no speeds
    #[arg(long)]
    pub(crate) no_calibration: bool,

    /// Check the plan against this device's memory instead of this machine's
    #[arg(long, value_name = "NAME", value_parser = PossibleValuesParser::new(PROFILES.iter().map(|p| p.name)))]
    pub(crate) device: Option<String>,
}

pub(crate) fn run(options: &Options, invocation: &Invocation) -> Result<()> {
    let tune = &options.tune;
    tune.model.path()?;
    tune.data.path()?;
    let prepared = prepare(tune, || match &options.device {
        Some(device) => provenance::room(device),
        None => room_of(tune, None),
    })?;
    eprint!("{}", prepared.describe());
    json::line(&prepared.table())?;
    let fits = prepared.check();
    // A plan that doesn't fit isn't timed. Rates of full fine-tuning aren't predicted.
    let pieces = match (&fits, prepared.settings.method.lora()) {
        (Ok(()), Some(lora)) if !options.no_calibration => Some(calibrate(
            &prepared.model,
            &tune.compute.kernels()?,
            lora,
            &prepared.planned.request,
            tune.compute.precision,
            tune.compute.gradient(),
        )),
        _ => None,
    };
    let ladder = prepared.ladder(pieces.as_ref());
    json::line(&format!("\n{}", ladder_table(&ladder)))?;
    json::line(&format!("\n{}", prepared.wear.describe(chosen_rate(&ladder))))?;
    invocation.emit(&prepared.json(fits.is_ok(), ladder))?;
    // A plan that doesn't fit is still a result; what went wrong follows it, as for every other failure.
    Ok(fits?)
}
