//! LoRA and DoRA adapters: what is adapted and how ([`LoraConfig`]), where each pair lies in the one flat
//! parameter vector ([`Layout`]), the parameters themselves ([`Adapter`]), and their file; and the
//! formats of other tools, each to and from an [`exchange::Exchange`].
//!
//! ```
//! use engraft_runtime::adapter::{Adapter, StoredAs};
//! use engraft_runtime::{Base, Disk, Method};
//!
//! # fn main() -> engraft_runtime::Result<()> {
//! let base = Base::open("../targets/cli/seedling.gguf")?;
//! let Method::Adapter(config) = Method::usual(base.model.config())? else { unreachable!() };
//! let adapter = Adapter::init_on(&base.model, &base.kernels, &config, &mut || 0.5)?;
//!
//! let folder = std::env::temp_dir().join(format!("engraft-doc-{}", std::process::id()));
//! engraft_runtime::storage::create_dir_all(&Disk, &folder)?;
//! let saved = adapter.save(&Disk, &folder, StoredAs::F32)?;
//! assert_eq!(Adapter::load(&saved.path)?.theta, adapter.theta);
//! # std::fs::remove_dir_all(folder).unwrap();
//! # Ok(())
//! # }
//! ```

pub mod approximate;
pub mod binding;
pub mod config;
pub mod exchange;
pub mod file;
pub mod foreign;
pub mod gains;
pub mod gguf_file;
pub mod imported;
pub mod mlx;
pub mod params;
pub mod peft;
mod safetensors;

pub use binding::{Binding, Fingerprint};
pub use config::{Case, Layout, LoraConfig, Override, RANK_MAX, Slot};
pub use file::{ADAPTER_FILE, StoredAs};
pub use gains::Gains;
pub use params::{Adapter, BaseIdentity, Init, TrainedWith};
