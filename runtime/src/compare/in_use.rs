//! What is in use before a comparison, and must be beaten.

use std::path::PathBuf;

use crate::error::{ErrorKind, Result};
use crate::gate::store::{self, Store};
use crate::model::chat::Message;
use crate::model::weights::ModelFile;

/// What is in use before a comparison. An adapter is read only while it is measured, so that it takes no memory from
/// training.
#[derive(Clone, Debug)]
pub enum InUse {
    /// An adapter's file.
    Adapter(PathBuf),
    /// Examples that go before every prompt.
    FewShot(Vec<Message>),
}

impl InUse {
    /// A store's active generation, with the name of its arm. One that can't be read, or that was made for another model,
    /// has nothing to be beaten in: `warn` is told, and there is none.
    ///
    /// # Errors
    /// Those of [`Store::active`] and [`Store::load`], except for damaged files.
    pub fn of_store(
        store: &Store<'_>,
        model: &ModelFile,
        warn: &mut dyn FnMut(&str),
    ) -> Result<Option<(String, InUse)>> {
        let generation = match store.active() {
            Ok(None) => return Ok(None),
            Ok(Some(active)) => active.generation,
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                warn(&format!("what is in use can't be compared: {error}"));
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        if let Err(error) = generation.check_base(&model.digest()) {
            warn(&format!("what is in use can't be compared: {error}"));
            return Ok(None);
        }
        let in_use = match store.load(&generation)? {
            store::InUse::Base => return Ok(None),
            store::InUse::FewShot(messages) => InUse::FewShot(messages),
            store::InUse::Adapter(_) => match store.adapter_file(&generation) {
                Some(file) => InUse::Adapter(file),
                None => unreachable!("its content is an adapter"),
            },
        };
        Ok(Some((format!("generation {}", generation.number), in_use)))
    }
}
