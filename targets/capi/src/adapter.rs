//! What is added to a model: an adapter, examples before the prompt, or nothing. Also slots, from which many
//! sessions take their adapter.

use std::ffi::c_char;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use engraft_kernels::Kernels;
use engraft_runtime::ErrorKind;
use engraft_runtime::adapter::{Adapter as Parameters, StoredAs};
use engraft_runtime::generate::{AdapterSlot, StackedAdapter};
use engraft_runtime::model::chat::Message;
use engraft_runtime::model::usage::Usage;
use engraft_runtime::storage::{Disk, FileLock, create_dir_all, lock_folder};

use crate::caller::{self, structs};
use crate::error::{ENGRAFT_BASE_MISMATCH, ENGRAFT_BUSY, ENGRAFT_MISUSE, Failure, Result};
use crate::handle::{self, kind};
use crate::model::{self, Model};

/// Trained parameters.
pub const ENGRAFT_KIND_ADAPTER: u32 = 1;
/// Examples that go before every prompt.
pub const ENGRAFT_KIND_FEW_SHOT: u32 = 2;
/// Nothing: only the base.
pub const ENGRAFT_KIND_BASE: u32 = 3;

/// What is added to a model. Immutable; any number of threads and sessions may use it at once.
pub struct Adapter {
    _opaque: [u8; 0],
}

kind!(Adapter, Inner, "adapter");

/// A place that sessions take their adapter from. `engraft_slot_swap` may be called at any time, from any
/// thread. A slot belongs to one model and keeps it: that of the first adapter put into it, or of the first
/// session that follows it.
pub struct Slot {
    _opaque: [u8; 0],
}

kind!(Slot, Place, "slot");

/// The value behind a slot handle.
pub(crate) struct Place {
    pub(crate) slot: Arc<AdapterSlot>,
    /// The model of the first adapter or the first session.
    model: OnceLock<Arc<model::Inner>>,
}

impl Place {
    /// Refuses a model other than the slot's.
    ///
    /// # Errors
    /// `BASE_MISMATCH`.
    pub(crate) fn check_of(&self, model: &Arc<model::Inner>) -> Result<()> {
        match self.model.get_or_init(|| model.clone()).is_same_base(model) {
            true => Ok(()),
            false => {
                let message = "the slot is used with another model; make another slot for this one";
                Err(Failure::new(ENGRAFT_BASE_MISMATCH, message))
            }
        }
    }
}

/// The value behind an adapter handle.
pub(crate) struct Inner {
    pub(crate) model: Arc<model::Inner>,
    /// The parameters as trained; none for examples and the base.
    pub(crate) parameters: Option<Box<Parameters>>,
    /// The same in the form that sessions use.
    pub(crate) stacked: Option<Arc<StackedAdapter>>,
    /// Examples to put before prompts.
    pub(crate) few_shot: Vec<Message>,
    /// How it is meant to be used.
    pub(crate) usage: Usage,
    /// Why a file of it would differ from what is used here, if it would.
    unlike: Option<(i32, &'static str)>,
}

/// How to load an adapter. Zero is the default for every field.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct AdapterParams {
    /// `sizeof(engraft_adapter_params)`.
    pub struct_size: u32,
    /// 1 accepts an adapter made for another base if its shapes fit. It can't be saved or promoted then.
    pub force_base: u32,
    /// Factor on its effect (0: 1, as trained). With any other factor it can't be saved or promoted.
    pub scale: f32,
    /// Threads for loading it (0: as many as there are cores).
    pub threads: u32,
}

/// Facts about an adapter.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct AdapterInfo {
    /// `sizeof(engraft_adapter_info)`.
    pub struct_size: u32,
    /// `ENGRAFT_KIND_ADAPTER`, `ENGRAFT_KIND_FEW_SHOT` or `ENGRAFT_KIND_BASE`; for the last two all else is 0.
    pub kind: u32,
    /// The largest rank of a projection.
    pub rank: u32,
    /// 1 for DoRA.
    pub dora: u32,
    /// Parameters.
    pub parameters: u64,
    /// Steps that it was trained for.
    pub steps: u64,
    /// Trained tokens: those that counted in the loss.
    pub tokens: u64,
    /// Held-out loss of the base in nats per token; NaN if unknown.
    pub valid_loss_before: f32,
    /// Held-out loss with the adapter; NaN if unknown.
    pub valid_loss_after: f32,
}

structs!(AdapterParams = "engraft_adapter_params", AdapterInfo = "engraft_adapter_info");

impl Inner {
    /// Examples, or the base alone if there are none.
    pub(crate) fn without_parameters(
        model: &Arc<model::Inner>,
        few_shot: Vec<Message>,
        usage: Usage,
    ) -> Inner {
        Inner { model: model.clone(), parameters: None, stacked: None, few_shot, usage, unlike: None }
    }

    /// An adapter that was trained here, so there is nothing to check it against.
    pub(crate) fn trusted(
        model: &Arc<model::Inner>,
        kernels: &Kernels,
        parameters: Parameters,
    ) -> Result<Inner> {
        let alone = [(parameters, 1.0)];
        let stacked = Arc::new(StackedAdapter::new(&model.file, kernels, &alone)?);
        let [(parameters, _)] = alone;
        let parameters = Some(Box::new(parameters));
        let (few_shot, usage) = (Vec::new(), stacked.usage().clone());
        Ok(Inner { model: model.clone(), parameters, stacked: Some(stacked), few_shot, usage, unlike: None })
    }

    /// An adapter from a file, checked against the model.
    pub(crate) fn held(
        model: &Arc<model::Inner>,
        kernels: &Arc<Kernels>,
        parameters: Parameters,
        params: &AdapterParams,
    ) -> Result<Inner> {
        let mut inner = Inner::trusted(model, kernels, parameters)?;
        let (Some(parameters), Some(stacked)) = (&inner.parameters, &inner.stacked) else { return Ok(inner) };
        let mut prober = model.prober(kernels, parameters.layout.rank_max());
        let now = prober.with(&**stacked);
        let mut unlike = None;
        match prober.check_found(parameters, now) {
            Ok(unrecorded) if unrecorded.is_empty() => {}
            Ok(unrecorded) => ::log::warn!(
                "the adapter's file doesn't record {}, so only the base's digest and shapes were checked",
                unrecorded.join(", ")
            ),
            Err(error) if params.force_base != 0 && error.kind() == ErrorKind::BaseMismatch => {
                ::log::warn!("used anyway because of force_base: {}", error.message());
                unlike = Some((ENGRAFT_BASE_MISMATCH, FORCED));
            }
            Err(error) => return Err(error.into()),
        }
        let scale = scale(params)?;
        if scale != 1.0 {
            let scaled = [((**parameters).clone(), scale)];
            inner.stacked = Some(Arc::new(StackedAdapter::new(&model.file, kernels, &scaled)?));
            unlike = unlike.or(Some((ENGRAFT_MISUSE, SCALED)));
        }
        inner.unlike = unlike;
        Ok(inner)
    }

    /// The same, judged in another way than its file says.
    pub(crate) fn used_as(self, usage: Usage) -> Inner {
        Inner { usage, ..self }
    }

    /// Refuses what was loaded for another model. The base alone fits every model.
    ///
    /// # Errors
    /// `BASE_MISMATCH`.
    pub(crate) fn check_of(&self, model: &Arc<model::Inner>) -> Result<()> {
        let is_base = self.stacked.is_none() && self.few_shot.is_empty();
        match is_base || self.model.is_same_base(model) {
            true => Ok(()),
            false => {
                let message = "the adapter was made or loaded for another model; load it for this one";
                Err(Failure::new(ENGRAFT_BASE_MISMATCH, message))
            }
        }
    }

    /// The parameters that a file or store may keep.
    ///
    /// # Errors
    /// `MISUSE` if there are none, or if they are used here at another scale; `BASE_MISMATCH` if they are for
    /// another base.
    pub(crate) fn parameters(&self) -> Result<&Parameters> {
        if let Some((code, why)) = self.unlike {
            return Err(Failure::new(code, why));
        }
        self.parameters
            .as_deref()
            .ok_or_else(|| Failure::misuse("this isn't an adapter with trained parameters"))
    }

    fn info(&self) -> AdapterInfo {
        let Some(p) = &self.parameters else {
            let kind = if self.few_shot.is_empty() { ENGRAFT_KIND_BASE } else { ENGRAFT_KIND_FEW_SHOT };
            return AdapterInfo { kind, ..caller::zeroed() };
        };
        AdapterInfo {
            struct_size: 0,
            kind: ENGRAFT_KIND_ADAPTER,
            rank: p.layout.rank_max() as u32,
            dora: u32::from(p.config.dora),
            parameters: p.layout.len() as u64,
            steps: p.meta.steps,
            tokens: p.meta.tokens,
            valid_loss_before: p.meta.valid_loss_before.unwrap_or(f32::NAN),
            valid_loss_after: p.meta.valid_loss_after.unwrap_or(f32::NAN),
        }
    }
}

const FORCED: &str = "the adapter was made for another base and is used here only because of force_base, so it \
                      can't be saved";
const SCALED: &str =
    "the adapter was loaded at another scale, but a file keeps it as trained; load it with scale 0";

fn scale(params: &AdapterParams) -> Result<f32> {
    match params.scale {
        0.0 => Ok(1.0),
        scale if scale.is_finite() && scale.abs() <= 1e3 => Ok(scale),
        scale => Err(Failure::misuse(format!("scale is {scale}, but must be -1000 to 1000"))),
    }
}

/// A folder's canonical name, if it exists. Under another name its holder would lock itself out and lose track of
/// its checkpoints.
pub(crate) fn one_name(folder: &Path) -> PathBuf {
    folder.canonicalize().unwrap_or_else(|_| folder.to_path_buf())
}

/// A folder that only this process writes to, until this is dropped.
pub(crate) struct Held {
    folder: PathBuf,
    _lock: FileLock,
}

/// Locks a folder, which is created if missing; returns nothing if `held` already locks it.
///
/// # Errors
/// `BUSY` if another writer has it; those of the system.
pub(crate) fn hold(folder: &Path, held: Option<&Held>) -> Result<Option<Held>> {
    create_dir_all(&Disk, folder)?;
    let folder = one_name(folder);
    if held.is_some_and(|held| held.folder == folder) {
        return Ok(None);
    }
    let lock = lock_folder(&Disk, &folder).map_err(|error| match Failure::from(error) {
        busy if busy.code == ENGRAFT_BUSY => {
            let place = folder.display();
            let message = format!(
                "{place}: a trainer with its checkpoints there, another call or another process writes to this \
                 folder; free it or wait for its end, or name another folder"
            );
            Failure::new(ENGRAFT_BUSY, message)
        }
        other => other,
    })?;
    Ok(Some(Held { folder, _lock: lock }))
}

/// Sets all fields to their default. `struct_size` is `sizeof(engraft_adapter_params)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_adapter_default_params(
    params: *mut AdapterParams,
    struct_size: usize,
) -> i32 {
    // SAFETY: the crate's contract, for the caller's struct.
    unsafe { caller::defaults("engraft_adapter_default_params", params, struct_size) }
}

/// Loads an adapter from its file, or from a folder that holds `adapter.engraft`, and checks it against the
/// model: base, shapes, and the results it gave when saved. `params` may be NULL. `*adapter` is freed with
/// `engraft_adapter_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_adapter_load(
    model: *const Model,
    path: *const c_char,
    path_length: usize,
    params: *const AdapterParams,
    adapter: *mut *mut Adapter,
) -> i32 {
    let make = |model: &Arc<model::Inner>| {
        // SAFETY: the crate's contract, for the caller's path and struct.
        let (path, params) = unsafe { (caller::path(path, path_length, "path")?, caller::settings(params)?) };
        let kernels = model::kernels(params.threads)?;
        let loaded = Parameters::load(&path)?;
        let held = Inner::held(model, &kernels, loaded, &params);
        let named = |f: Failure| Failure::new(f.code, format!("{}: {}", path.display(), f.message));
        held.map_err(named)
    };
    // SAFETY: the crate's contract, for the caller's place.
    unsafe { caller::make("engraft_adapter_load", model, adapter, make) }
}

/// Frees an adapter; sessions and slots that use it keep what they need. Does nothing for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_adapter_free(adapter: *mut Adapter) -> i32 {
    handle::free("engraft_adapter_free", adapter)
}

/// Gets facts about an adapter. Set `struct_size` first.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_adapter_get_info(adapter: *const Adapter, info: *mut AdapterInfo) -> i32 {
    handle::call("engraft_adapter_get_info", adapter, |adapter| {
        // SAFETY: the crate's contract, for the caller's struct.
        unsafe { caller::answer(info, adapter.info()) }
    })
}

/// Commits an adapter as `adapter.engraft` in a folder, which is created if missing. A `half` of 1 stores it in
/// 16 bits. When this returns 0, the file is on disk, was read back, and only its owner can read it. `BUSY` if a
/// trainer has its checkpoints in the folder, or another call or process writes to it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_adapter_save(
    adapter: *const Adapter,
    folder: *const c_char,
    folder_length: usize,
    half: u32,
) -> i32 {
    handle::call("engraft_adapter_save", adapter, |adapter| {
        // SAFETY: the crate's contract, for the caller's path.
        let folder = unsafe { caller::path(folder, folder_length, "folder") }?;
        let parameters = adapter.parameters()?;
        let _held = hold(&folder, None)?;
        let stored = if half == 0 { StoredAs::F32 } else { StoredAs::F16 };
        let mut prober = adapter.model.prober(&model::kernels(0)?, parameters.layout.rank_max());
        prober.save(parameters, stored, (&Disk, &folder))?;
        Ok(())
    })
}

/// Makes an empty slot: sessions that follow it use the base alone. `*slot` is freed with `engraft_slot_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_slot_create(slot: *mut *mut Slot) -> i32 {
    let make = || Ok(Place { slot: Arc::new(AdapterSlot::new(None)), model: OnceLock::new() });
    // SAFETY: the crate's contract, for the caller's place.
    unsafe { caller::make_alone("engraft_slot_create", slot, make) }
}

/// Frees a slot; sessions that follow it keep what it held. Does nothing for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_slot_free(slot: *mut Slot) -> i32 {
    handle::free("engraft_slot_free", slot)
}

/// Puts an adapter, or with NULL the base alone, into a slot. Each session that follows the slot uses it from
/// its next token on. Never waits if adapter and slot share a model handle; otherwise it may read both model
/// files to compare their digests. `*generation` counts the swaps; it may be NULL. `BASE_MISMATCH` for an adapter
/// of another model.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_slot_swap(
    slot: *const Slot,
    adapter: *const Adapter,
    generation: *mut u64,
) -> i32 {
    handle::call("engraft_slot_swap", slot, |slot| {
        let adapter = handle::find_if_given(adapter)?;
        let stacked = match &adapter {
            None => None,
            Some(given) if !given.value.few_shot.is_empty() => {
                let message = "examples can't be swapped between tokens; use engraft_session_set_adapter";
                return Err(Failure::misuse(message));
            }
            Some(given) => given.value.stacked.clone(),
        };
        if let (Some(given), Some(_)) = (&adapter, &stacked) {
            slot.check_of(&given.value.model)?;
        }
        let swapped = slot.slot.swap(stacked);
        // SAFETY: the crate's contract, for the caller's number.
        unsafe { caller::put(generation, swapped) };
        Ok(())
    })
}
