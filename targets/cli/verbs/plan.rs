//! `engraft plan`: the memory of a training run, before it starts.

use anyhow::Result;
use clap::Args;

use super::Session;
use super::prepare::prepare;
use crate::exit::AfterJson;
use crate::json;
use crate::options::TuneOptions;

#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) tune: TuneOptions,
}

pub(crate) fn run(options: &Options, session: &Session) -> Result<()> {
    let tune = &options.tune;
    tune.model.path()?;
    tune.data.path()?;
    let prepared = prepare(tune)?;
    eprintln!("{}", tune.lora.describe());
    json::line(&prepared.table())?;
    let fits = prepared.check(tune.memory_budget);
    if session.json {
        json::emit(&prepared.json(fits.is_ok()))?;
        // A plan that does not fit is a result all the same: the exit code alone tells the failure.
        return fits.map_err(|e| anyhow::Error::from(e).context(AfterJson("plan")));
    }
    Ok(fits?)
}
