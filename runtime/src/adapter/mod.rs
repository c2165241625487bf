//! LoRA and DoRA adapters: what is adapted and how ([`LoraConfig`]), where each pair lies in the one flat
//! parameter vector ([`Layout`]), the parameters themselves ([`Adapter`]), and their file; and the
//! formats of other tools, each to and from an [`exchange::Exchange`].

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
