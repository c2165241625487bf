//! LoRA and DoRA adapters: what is adapted and how ([`LoraConfig`]), where each pair lies in the one flat
//! parameter vector ([`Layout`]), the parameters themselves ([`Adapter`]), and their file.

pub mod config;
pub mod file;
pub mod gains;
pub mod params;

pub use config::{Case, Layout, LoraConfig, Override, RANK_MAX, Slot};
pub use file::{ADAPTER_FILE, Precision};
pub use gains::Gains;
pub use params::{Adapter, BaseIdentity, TrainedWith};
