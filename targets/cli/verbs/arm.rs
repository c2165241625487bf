//! The file that a whole model becomes once it is tuned.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use engraft_runtime::data::TrainValid;
use engraft_runtime::data::batches::in_order;
use engraft_runtime::error::Result;
use engraft_runtime::eval::scoring_chain;
use engraft_runtime::merge;
use engraft_runtime::model::tuned::TunedModel;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::storage::Disk;
use engraft_runtime::train::Evaluated;

use super::{Session, common};
use crate::options::TuneOptions;

/// The model of a finished run.
pub(super) const MODEL_FILE: &str = "model.gguf";
/// That of a run that was stopped: it never takes the place of a finished one.
pub(super) const STOPPED_FILE: &str = "stopped.gguf";

/// Commits tuned weights as a model in `--adapter-path`.
pub(super) fn write_model(tune: &TuneOptions, tuned: &TunedModel, name: &str) -> Result<PathBuf> {
    Ok(merge::tuned::write(&Disk, &tune.adapter_path, name, tuned, tune.lora.dtype)?.path)
}

/// Held-out loss of a model's file, as `eval` measures it; `None` without held-out rows, or when stopped.
pub(super) fn score_file(
    tune: &TuneOptions,
    session: &Session,
    data: &TrainValid,
    file: &PathBuf,
) -> Result<Option<f64>> {
    let rows = &data.valid.examples;
    if rows.is_empty() {
        return Ok(None);
    }
    let (model, kernels) = (Arc::new(ModelFile::open(file)?), common::kernels(&tune.compute)?);
    let precision = common::precision(&tune.compute);
    let mut chain = scoring_chain(model, kernels, precision, 0, data.valid.rows_max());
    let mut total = Evaluated::default();
    for batch in in_order(rows, 1) {
        if session.cancel.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let scored = chain.evaluate(None, &batch, |_, _| {});
        total.loss_sum += scored.loss_sum;
        total.targets += scored.targets;
    }
    let loss = total.loss_sum / total.targets as f64;
    Ok(Some(common::finite(loss, "the held-out loss of the model that was written")?))
}
