//! Models: GGUF files opened for use. Immutable, and shared by everything made from them.

use std::ffi::c_char;
use std::num::NonZero;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use engraft_kernels::Kernels;
use engraft_runtime::model::digest_cache::DigestCache;
use engraft_runtime::model::map::Map;
use engraft_runtime::model::text::Text;
use engraft_runtime::model::tuned::TunedLayout;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::nn::Precision;
use engraft_runtime::probe::Prober;

use crate::caller::{self, at_most, structs};
use crate::error::{Failure, Result};
use crate::handle::{self, kind};

/// Maximum number of threads.
const THREADS_MAX: u32 = 256;

/// A model, opened by `engraft_model_open`. Any number of threads may use it at once.
pub struct Model {
    _opaque: [u8; 0],
}

kind!(Model, Arc<Inner>, "model");

/// What a model shares with everything made from it.
pub(crate) struct Inner {
    pub(crate) file: Arc<ModelFile>,
    /// Built when first needed, because many apps only plan.
    text: Mutex<Option<Arc<Text>>>,
}

/// How to open a model. Zero is the default for every field.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct ModelParams {
    /// `sizeof(engraft_model_params)`.
    pub struct_size: u32,
    /// 1 reads the file into private memory instead of mapping it. For files that may be truncated during use,
    /// which would kill a process that maps them.
    pub no_mmap: u32,
    /// A folder that caches digests of model files, so that each is fully read only once: UTF-8. NULL for none.
    pub digest_cache: *const c_char,
    /// Bytes of `digest_cache`.
    pub digest_cache_length: usize,
}

/// Facts about a model.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct ModelInfo {
    /// `sizeof(engraft_model_info)`.
    pub struct_size: u32,
    /// Tokens of the vocabulary.
    pub vocab: u32,
    /// Width.
    pub d_model: u32,
    /// Transformer blocks.
    pub n_layers: u32,
    /// Query heads.
    pub n_heads: u32,
    /// Key and value heads.
    pub n_kv_heads: u32,
    /// Width of the MLP.
    pub d_ff: u32,
    /// Positions that it was trained on.
    pub context_length: u32,
    /// Weights.
    pub parameters: u64,
    /// Bytes of the file that are mapped: clean pages, which the system may drop.
    pub mapped_bytes: u64,
    /// Bytes of private memory, without the tokenizer.
    pub private_bytes: u64,
    /// Bytes of private memory that the tokenizer takes once needed.
    pub tokenizer_bytes: u64,
}

structs!(ModelParams = "engraft_model_params", ModelInfo = "engraft_model_info");

impl Inner {
    /// Tokenizer and chat template.
    ///
    /// # Errors
    /// Those of [`Text::of`].
    pub(crate) fn text(&self) -> Result<Arc<Text>> {
        let mut text = self.text.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(text) = &*text {
            return Ok(text.clone());
        }
        Ok(text.insert(Arc::new(Text::of(&self.file)?)).clone())
    }

    /// Private memory of the tokenizer, whether or not it is built.
    pub(crate) fn text_bytes(&self) -> Result<usize> {
        Ok(Text::heap_bytes(&self.file)?)
    }

    /// Whether both are the same base for adapters. Reads both files unless it is the same handle, their digests
    /// are known, or their shapes differ.
    pub(crate) fn is_same_base(self: &Arc<Inner>, other: &Arc<Inner>) -> bool {
        let (a, b) = (&self.file, &other.file);
        Arc::ptr_eq(self, other) || (a.config() == b.config() && a.digest() == b.digest())
    }

    /// The prober that takes fingerprints of adapters up to a rank.
    pub(crate) fn prober(&self, kernels: &Arc<Kernels>, rank: usize) -> Prober {
        Prober::new(&self.file, kernels, rank)
    }
}

/// Kernels with this many threads; 0 for as many as there are cores.
pub(crate) fn kernels(threads: u32) -> Result<Arc<Kernels>> {
    Ok(Arc::new(Kernels::detect(self::threads(threads)?)))
}

/// The number of threads asked for; 0 means as many as there are cores.
pub(crate) fn threads(asked: u32) -> Result<usize> {
    match asked {
        0 => Ok(std::thread::available_parallelism().map_or(1, NonZero::get).min(THREADS_MAX as usize)),
        _ => Ok(at_most(asked, THREADS_MAX, "threads")? as usize),
    }
}

/// How products treat activations.
pub(crate) fn precision(exact: u32) -> Precision {
    if exact == 0 { Precision::Int8 } else { Precision::F32 }
}

/// Sets all fields to their default. `struct_size` is `sizeof(engraft_model_params)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_model_default_params(params: *mut ModelParams, struct_size: usize) -> i32 {
    // SAFETY: the crate's contract, for the caller's struct.
    unsafe { caller::defaults("engraft_model_default_params", params, struct_size) }
}

/// Opens and checks the model file at `path` (UTF-8). `params` may be NULL. `*model` is freed with
/// `engraft_model_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_model_open(
    path: *const c_char,
    path_length: usize,
    params: *const ModelParams,
    model: *mut *mut Model,
) -> i32 {
    let make = || {
        // SAFETY: the crate's contract, for the caller's path and struct.
        let (path, params): (_, ModelParams) =
            unsafe { (caller::path(path, path_length, "path")?, caller::settings(params)?) };
        let map = if params.no_mmap == 0 { Map::open(&path)? } else { Map::read(&path)? };
        let mut file = ModelFile::from_map(map)?;
        if params.digest_cache_length > 0 {
            let (folder, length) = (params.digest_cache, params.digest_cache_length);
            // SAFETY: the crate's contract, for the caller's path.
            let folder: PathBuf = unsafe { caller::path(folder, length, "digest_cache") }?;
            file = file.with_digest_cache(DigestCache::new(folder));
        }
        Ok(Arc::new(Inner { file: Arc::new(file), text: Mutex::new(None) }))
    };
    // SAFETY: the crate's contract, for the caller's place.
    unsafe { caller::make_alone("engraft_model_open", model, make) }
}

/// Frees a model, now or as soon as nothing made from it is left. Does nothing for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_model_free(model: *mut Model) -> i32 {
    handle::free("engraft_model_free", model)
}

/// Gets facts about a model. Set `struct_size` first.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_model_get_info(model: *const Model, info: *mut ModelInfo) -> i32 {
    handle::call("engraft_model_get_info", model, |model| {
        let (file, c) = (&model.file, model.file.config());
        // Shapes were checked to be far below 2^32.
        let found = ModelInfo {
            struct_size: 0,
            vocab: c.vocab as u32,
            d_model: c.d_model as u32,
            n_layers: c.n_layers as u32,
            n_heads: c.n_heads as u32,
            n_kv_heads: c.n_kv_heads as u32,
            d_ff: c.d_ff as u32,
            context_length: c.context_len.min(u32::MAX as usize) as u32,
            parameters: TunedLayout::new(c).len() as u64,
            mapped_bytes: file.mapped_bytes() as u64,
            private_bytes: file.private_bytes() as u64,
            tokenizer_bytes: Text::heap_bytes(file)? as u64,
        };
        // SAFETY: the crate's contract, for the caller's struct.
        unsafe { caller::answer(info, found) }
    })
}

/// Copies the name in the model's file (`general.name`), which may be empty; see `engraft_message` for the buffer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_model_name(
    model: *const Model,
    buffer: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> i32 {
    handle::call("engraft_model_name", model, |model| {
        let name = model.file.gguf().string("general.name")?.unwrap_or_default();
        // SAFETY: the crate's contract, for the caller's buffer.
        unsafe { caller::copy_text(name, buffer, capacity, length) }
    })
}

/// Puts the 32 bytes that identify the model to adapters into `digest`. The first call reads the whole file
/// unless a digest cache knows it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_model_digest(model: *const Model, digest: *mut u8) -> i32 {
    handle::call("engraft_model_digest", model, |model| {
        if digest.is_null() {
            return Err(Failure::misuse("digest is NULL"));
        }
        let found = model.file.digest();
        // SAFETY: it is not NULL; the crate's contract, for 32 bytes.
        unsafe { caller::put(digest.cast::<[u8; 32]>(), found) };
        Ok(())
    })
}

/// Frees memory that can be rebuilt: the tokenizer, unless it is in use. Call it when the system warns of low
/// memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_model_trim(model: *const Model) -> i32 {
    handle::tell("engraft_model_trim", model, |model| {
        let text = model.text.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(text);
    })
}
