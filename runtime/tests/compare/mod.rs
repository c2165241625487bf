//! Comparisons of arms: what each part measures against something that computes it otherwise, and whole
//! comparisons whose winner, or lack of one, is known beforehand.

mod folds;
mod material;
mod run;
mod score;
mod shots;
mod whole;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use engraft_kernels::Kernels;
use engraft_runtime::adapter::LoraConfig;
use engraft_runtime::compare::material::{Limits, Material};
use engraft_runtime::compare::recipe::Recipe;
use engraft_runtime::compare::score::Subject;
use engraft_runtime::data::DataOptions;
use engraft_runtime::error::{Error, ErrorKind, Result};
use engraft_runtime::model::Proj;
use engraft_runtime::model::text::Text;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::nn::Precision;
use engraft_runtime::run::{Base, Event, Length, Looks, Method, Observer, Settings};

/// Looks on in silence, and can stop everything.
#[derive(Default)]
pub struct Quiet {
    pub(crate) steps: u64,
    pub(crate) looks: Vec<(u64, f64)>,
    /// What was forgotten at each, where that is measured.
    pub(crate) forgot: Vec<f64>,
    pub(crate) notes: Vec<String>,
    /// Steps after which nothing goes on.
    pub stop_after: Option<u64>,
}

impl Observer for Quiet {
    fn go_on(&mut self, _: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        match self.stop_after.is_some_and(|n| self.steps >= n) {
            true => Err(Error::new(ErrorKind::Cancelled, "stopped")),
            false => Ok(()),
        }
    }

    fn tell(&mut self, _: &str, event: Event<'_>) {
        match event {
            Event::Note(text) => self.notes.push(text.to_string()),
            Event::Step(_) => self.steps += 1,
            Event::Look { step, loss, forgot, .. } => {
                self.looks.push((step, loss));
                self.forgot.extend(forgot);
            }
            _ => {}
        }
    }
}

/// A file of the program's own: the built-in model, the demo's rows.
fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../targets/cli").join(name)
}

/// The built-in model, a base of about a million parameters.
fn base_of(threads: usize) -> Base {
    let model = Arc::new(ModelFile::open(shipped("seedling.gguf")).expect("the built-in model"));
    Base {
        model,
        kernels: Arc::new(Kernels::detect(threads)),
        precision: Precision::F32,
        gradient: Precision::F32.into(),
        held_bytes: 0,
    }
}

fn text_of(base: &Base) -> Text {
    Text::of(&base.model).expect("a tokenizer")
}

fn subject(base: &Base) -> Subject {
    Subject::of(base)
}

/// How rows of the built-in model are read.
fn reading() -> DataOptions {
    DataOptions { max_seq_length: 128, valid_fraction: 0.2, ..DataOptions::default() }
}

fn write_rows(file: PathBuf, rows: &[String]) {
    std::fs::write(file, rows.join("\n") + "\n").expect("writing");
}

fn lines(name: &str) -> Vec<String> {
    let text = std::fs::read_to_string(shipped(name)).expect("a file of the demo");
    text.lines().map(str::to_string).collect()
}

fn pair(prompt: &str, completion: &str) -> String {
    serde_json::json!({"prompt": prompt, "completion": completion}).to_string()
}

fn read(path: &Path, text: &Text) -> Result<Material> {
    Material::read(path, text, &reading(), Limits::default())
}

/// The demo's private commands: forty to train with, `held_out` to decide by.
fn household(text: &Text, held_out: usize) -> Material {
    let folder = tempfile::tempdir().expect("a folder");
    write_rows(folder.path().join("train.jsonl"), &lines("demo/private_train.jsonl"));
    write_rows(folder.path().join("test.jsonl"), &lines("demo/private_test.jsonl")[..held_out]);
    read(folder.path(), text).expect("the demo's rows")
}

/// LoRA on everything, as it suits the built-in model.
fn recipe(base: &Base, name: &str, rate: f64, length: Length) -> Recipe {
    let c = base.model.config();
    let layers: Vec<usize> = (0..c.n_layers).collect();
    let lora = LoraConfig::new(c, 4, 8.0, 0.0, &Proj::ALL, &layers).expect("a valid setting");
    let settings = Settings {
        rate: Some(rate),
        length,
        batch: 8,
        looks: Looks::Best { times: 10, patience: 0 },
        ..Settings::of_arm(Method::Adapter(lora))
    };
    Recipe::new(name, settings)
}

/// A recipe with other settings.
fn with(recipe: &Recipe, change: impl FnOnce(Settings) -> Settings) -> Recipe {
    Recipe { settings: change(recipe.settings.clone()), ..recipe.clone() }
}
