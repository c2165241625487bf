//! Stores: the promoted generations, and which one is active.

use std::ffi::c_char;
use std::path::PathBuf;
use std::sync::Arc;

#[cfg(feature = "gate")]
use engraft_runtime::compare::Product;
use engraft_runtime::gate::store::{Candidate, ContentKind, Generation, InUse, Listing, Store as Folder};
use engraft_runtime::model::usage::Usage;
use engraft_runtime::storage::Disk;

use crate::adapter::{
    self, Adapter, AdapterParams, ENGRAFT_KIND_ADAPTER, ENGRAFT_KIND_BASE, ENGRAFT_KIND_FEW_SHOT,
};
use crate::caller::{self, structs};
use crate::error::{Failure, Result};
#[cfg(feature = "gate")]
use crate::gate::Gate;
use crate::handle::{self, kind};
use crate::model::{self, Model};

/// A folder of generations. Any number of threads may use it at once. Only one writer, of all processes, may
/// change it at a time; others get `BUSY`.
pub struct Store {
    _opaque: [u8; 0],
}

kind!(Store, Inner, "store");

/// The value behind a store handle.
pub(crate) struct Inner {
    pub(crate) folder: PathBuf,
}

/// How to open a store. Zero is the default for every field.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct StoreParams {
    /// `sizeof(engraft_store_params)`.
    pub struct_size: u32,
    /// 1 refuses a folder that isn't a store instead of making it one.
    pub must_exist: u32,
}

/// Facts about a generation.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct GenerationInfo {
    /// `sizeof(engraft_generation_info)`.
    pub struct_size: u32,
    /// `ENGRAFT_KIND_*`; 0 if nothing was ever promoted, and then all else is 0, too.
    pub kind: u32,
    /// Its number, from 1.
    pub number: u64,
    /// The generation that a rollback leads to; 0 for none.
    pub previous: u64,
    /// Bytes of its files.
    pub bytes: u64,
    /// How many damaged generations were passed over for this one; the log says why.
    pub passed_over: u64,
    /// Digest of the model that it is for.
    pub base_digest: [u8; 32],
}

structs!(StoreParams = "engraft_store_params", GenerationInfo = "engraft_generation_info");

impl Inner {
    fn open(&self) -> Result<Folder<'static>> {
        Ok(Folder::open(&Disk, &self.folder)?)
    }

    fn promote(&self, candidate: &Candidate<'_>, verdict: &[u8], model: &model::Inner) -> Result<u64> {
        let base = (&model.file.digest(), model.file.config());
        Ok(self.open()?.promote(candidate, verdict, base, false)?.number)
    }
}

fn kind(generation: &Generation) -> u32 {
    match generation.content {
        ContentKind::Adapter => ENGRAFT_KIND_ADAPTER,
        ContentKind::FewShot => ENGRAFT_KIND_FEW_SHOT,
        ContentKind::Base => ENGRAFT_KIND_BASE,
    }
}

fn describe(listing: &Listing) -> String {
    let one = |listed: &engraft_runtime::gate::store::Listed| match &listed.manifest {
        Ok(generation) => serde_json::json!({
            "number": listed.number,
            "kind": generation.content,
            "previous": generation.previous,
            "bytes": generation.bytes(),
        }),
        Err(problem) => serde_json::json!({
            "number": listed.number,
            "problem": problem,
            "unfinished": listed.is_unfinished,
        }),
    };
    let active = listing.active.as_ref().map(|active| active.generation.number);
    let generations: Vec<_> = listing.generations.iter().map(one).collect();
    serde_json::json!({ "active": active, "generations": generations }).to_string()
}

/// Sets all fields to their default. `struct_size` is `sizeof(engraft_store_params)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_store_default_params(params: *mut StoreParams, struct_size: usize) -> i32 {
    // SAFETY: the crate's contract, for the caller's struct.
    unsafe { caller::defaults("engraft_store_default_params", params, struct_size) }
}

/// Opens the store in a folder. A missing folder is created, accessible only to its owner. `params` may be NULL.
/// `*store` is freed with `engraft_store_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_store_open(
    folder: *const c_char,
    folder_length: usize,
    params: *const StoreParams,
    store: *mut *mut Store,
) -> i32 {
    let make = || {
        // SAFETY: the crate's contract, for the caller's path and struct.
        let (folder, params): (_, StoreParams) =
            unsafe { (caller::path(folder, folder_length, "folder")?, caller::settings(params)?) };
        match params.must_exist {
            0 => Folder::create(&Disk, &folder)?,
            _ => Folder::open(&Disk, &folder)?,
        };
        Ok(Inner { folder })
    };
    // SAFETY: the crate's contract, for the caller's place.
    unsafe { caller::make_alone("engraft_store_open", store, make) }
}

/// Frees a store; the folder stays as it is. Does nothing for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_store_free(store: *mut Store) -> i32 {
    handle::free("engraft_store_free", store)
}

/// Makes the winner of a gate's verdict the active generation and puts its number into `*generation`, which may
/// be NULL. `GATE_REFUSED` if the base alone stays; nothing changes then. When this returns 0, everything is on
/// disk and was read back.
#[cfg(feature = "gate")]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_store_promote(
    store: *const Store,
    gate: *const Gate,
    generation: *mut u64,
) -> i32 {
    handle::call("engraft_store_promote", store, |store| {
        let gate = handle::find(gate)?;
        let trial = gate.value.trial.enter()?;
        let candidate = match trial.winner()? {
            Product::Adapter(parameters) => Candidate::Adapter(parameters),
            Product::FewShot(messages) => Candidate::FewShot(messages),
            Product::File(_) | Product::Model(_) => return Err(Failure::misuse("the winner is a file")),
        };
        let verdict = trial.outcome()?.verdict.to_json()?;
        let number = store.promote(&candidate, verdict.as_bytes(), &trial.model)?;
        // SAFETY: the crate's contract, for the caller's number.
        unsafe { caller::put(generation, number) };
        Ok(())
    })
}

/// Makes an adapter the active generation on the caller's judgement, without the gate. `verdict` is stored with
/// it unchanged: say why. `*generation` may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_store_promote_adapter(
    store: *const Store,
    adapter: *const Adapter,
    verdict: *const c_char,
    verdict_length: usize,
    generation: *mut u64,
) -> i32 {
    handle::call("engraft_store_promote_adapter", store, |store| {
        let adapter = handle::find(adapter)?;
        // SAFETY: the crate's contract, for the caller's text.
        let verdict = unsafe { caller::text(verdict, verdict_length, "verdict") }?;
        if verdict.trim().is_empty() {
            return Err(Failure::misuse("verdict is empty; say why this adapter is promoted"));
        }
        let model = &adapter.value.model;
        let bound;
        let parameters = match adapter.value.parameters()? {
            parameters if parameters.binding.is_some() => parameters,
            parameters => {
                let mut prober = model.prober(&model::kernels(0)?, parameters.layout.rank_max());
                let mut copy = parameters.clone();
                copy.binding = Some(prober.bind(&copy)?);
                bound = copy;
                &bound
            }
        };
        let number = store.promote(&Candidate::Adapter(parameters), verdict.as_bytes(), model)?;
        // SAFETY: the crate's contract, for the caller's number.
        unsafe { caller::put(generation, number) };
        Ok(())
    })
}

/// Gets facts about the active generation and verifies its files. Set `struct_size` first.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_store_active(store: *const Store, info: *mut GenerationInfo) -> i32 {
    handle::call("engraft_store_active", store, |store| {
        let mut found: GenerationInfo = caller::zeroed();
        if let Some(active) = store.open()?.active()? {
            let generation = &active.generation;
            active.passed_over.iter().for_each(|why| ::log::warn!("passed over: {why}"));
            found = GenerationInfo {
                struct_size: 0,
                kind: kind(generation),
                number: generation.number,
                previous: generation.previous.unwrap_or(0),
                bytes: generation.bytes(),
                passed_over: active.passed_over.len() as u64,
                base_digest: generation.base,
            };
        }
        // SAFETY: the crate's contract, for the caller's struct.
        unsafe { caller::answer(info, found) }
    })
}

/// Loads the active generation and checks it against the model: an adapter, examples, or the base alone (also if
/// nothing was ever promoted). `params` may be NULL. `*adapter` is freed with `engraft_adapter_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_store_load(
    store: *const Store,
    model: *const Model,
    params: *const AdapterParams,
    adapter: *mut *mut Adapter,
) -> i32 {
    let make = |store: &Inner| {
        // SAFETY: the crate's contract, for the caller's struct.
        let params: AdapterParams = unsafe { caller::settings(params) }?;
        let model: Arc<model::Inner> = handle::find(model)?.value.clone();
        let folder = store.open()?;
        let Some(active) = folder.active()? else {
            return Ok(adapter::Inner::without_parameters(&model, Vec::new(), Usage::default()));
        };
        active.passed_over.iter().for_each(|why| ::log::warn!("passed over: {why}"));
        let (generation, digest) = (&active.generation, model.file.digest());
        let in_use = folder.load(generation)?;
        let usage = folder.usage(generation, &in_use)?;
        match in_use {
            InUse::Adapter(parameters) => {
                let kernels = model::kernels(params.threads)?;
                Ok(adapter::Inner::held(&model, &kernels, *parameters, &params)?.used_as(usage))
            }
            InUse::FewShot(messages) => {
                if params.force_base == 0 {
                    generation.check_base(&digest)?;
                }
                Ok(adapter::Inner::without_parameters(&model, messages, usage))
            }
            InUse::Base => Ok(adapter::Inner::without_parameters(&model, Vec::new(), usage)),
        }
    };
    // SAFETY: the crate's contract, for the caller's place.
    unsafe { caller::make("engraft_store_load", store, adapter, make) }
}

/// Makes the previously active generation active again and puts its number into `*generation`, which may be
/// NULL. `MISUSE` if there is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_store_rollback(store: *const Store, generation: *mut u64) -> i32 {
    handle::call("engraft_store_rollback", store, |store| {
        let folder = store.open()?;
        let active = folder.writer()?.rollback()?;
        // SAFETY: the crate's contract, for the caller's number.
        unsafe { caller::put(generation, active.number) };
        Ok(())
    })
}

/// Makes a generation active after verifying it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_store_activate(store: *const Store, generation: u64) -> i32 {
    handle::call("engraft_store_activate", store, |store| {
        let folder = store.open()?;
        folder.writer()?.activate(generation)?;
        Ok(())
    })
}

/// Removes all generations except the newest `keep` good ones, the active one, and the one that a rollback leads
/// to. Puts the number of removed ones into `*removed`, which may be NULL. `MISUSE` for a `keep` of 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_store_prune(store: *const Store, keep: usize, removed: *mut u64) -> i32 {
    handle::call("engraft_store_prune", store, |store| {
        let folder = store.open()?;
        let pruned = folder.writer()?.prune(keep)?;
        // SAFETY: the crate's contract, for the caller's number.
        unsafe { caller::put(removed, pruned.removed.len() as u64) };
        Ok(())
    })
}

/// Copies a list of all generations as JSON: `{"active":2,"generations":[{"number":1,"kind":"adapter",…}]}`;
/// see `engraft_message` for the buffer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_store_list(
    store: *const Store,
    buffer: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> i32 {
    handle::call("engraft_store_list", store, |store| {
        let listing = store.open()?.list()?;
        // SAFETY: the crate's contract, for the caller's buffer.
        unsafe { caller::copy_text(&describe(&listing), buffer, capacity, length) }
    })
}
