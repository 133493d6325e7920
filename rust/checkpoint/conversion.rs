//! What to do about weights that cannot be read as they are: a command that converts them.

use std::path::Path;

/// Endings of files that torch writes.
pub(super) const TORCH: [&str; 4] = [".bin", ".pt", ".pth", ".ckpt"];
/// Endings of weights in formats that are not read.
const FOREIGN: [&str; 4] = [GGUF, ".msgpack", ".h5", ".onnx"];
const GGUF: &str = ".gguf";
/// How files begin that each hold a part of every tensor, in Llama's own format.
const CUT: &str = "consolidated";

/// Beginnings of what training leaves beside the weights, in the same formats.
const TRAINING: [&str; 7] = [
    "training_args",
    "optimizer",
    "scheduler",
    "scaler",
    "rng_state",
    "random_states",
    "global_step",
];

const FROM_TORCH: &str = "python -c \"import sys, torch; from safetensors.torch import save_file; \
    save_file({name: tensor.contiguous().clone() for name, tensor in \
    torch.load(sys.argv[2], map_location='cpu', weights_only=True).items()}, sys.argv[1], \
    {'format': 'pt'})\"";
const FROM_SCRIPT: &str = "python -c \"import sys, torch; from safetensors.torch import save_file; \
    save_file({name: tensor.contiguous().clone() for name, tensor in \
    torch.jit.load(sys.argv[2], map_location='cpu').state_dict().items()}, sys.argv[1], \
    {'format': 'pt'})\"";
const FROM_GGUF: &str = "python -c \"import sys; from transformers import AutoModelForCausalLM as M; \
    M.from_pretrained(sys.argv[1], gguf_file=sys.argv[2]).save_pretrained(sys.argv[3])\"";

/// Of the names in a directory those of weights that torch wrote, each of them whole.
pub(super) fn of_torch(names: &[String]) -> Vec<&str> {
    let names = ending_with(names, &TORCH);
    let is_cut = names.len() > 1 && names.iter().all(|name| name.starts_with(CUT));
    if is_cut { Vec::new() } else { names }
}

/// Of the names in a directory those of weights that cannot be read.
pub(super) fn foreign(names: &[String]) -> Vec<&str> {
    let mut found = ending_with(names, &FOREIGN);
    found.extend(ending_with(names, &TORCH)); // parts of tensors
    found
}

fn ending_with<'a>(names: &'a [String], endings: &[&str]) -> Vec<&'a str> {
    let is_state = |name: &str| TRAINING.iter().any(|beginning| name.starts_with(beginning));
    let is_one = |name: &&str| endings.iter().any(|ending| name.ends_with(ending));
    names.iter().map(String::as_str).filter(|name| is_one(name) && !is_state(name)).collect()
}

/// What to do about weights in `directory` that cannot be read, by their names in order.
pub(super) fn advice(directory: &Path, names: &[&str]) -> String {
    match names.iter().find(|name| name.ends_with(GGUF)) {
        Some(name) => from_gguf(&directory.join(name)),
        None => "download the model's weights in safetensors or PyTorch format".to_owned(),
    }
}

/// What to do about a file that torch can read, and oxmerge cannot.
pub(super) fn torch_file(path: &Path) -> String {
    let (out, file) = (quoted(&path.with_extension("safetensors")), quoted(path));
    format!("with torch and safetensors installed, run: {FROM_TORCH} {out} {file}")
}

/// What to do about a program.
pub(super) fn script(path: &Path) -> String {
    let (out, file) = (quoted(&path.with_extension("safetensors")), quoted(path));
    format!(
        "take the weights that it was made from; or, if you trust it, with torch and safetensors \
         installed, run: {FROM_SCRIPT} {out} {file}"
    )
}

/// What to do about an archive of tar, which torch reads only if it may run what is in it.
pub(super) const TAR: &str = "take the weights in a newer format; or, if you trust the file, load it \
    with `torch.load(FILE, weights_only=False)` and save the dictionary of tensors";

/// What to do about a GGUF file.
pub(super) fn from_gguf(path: &Path) -> String {
    let folder = path.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."));
    let name = quoted(Path::new(path.file_name().unwrap_or_default()));
    let (folder, out) = (quoted(folder), quoted(&path.with_extension("converted")));
    format!(
        "take the 16-bit weights that it was made from, or, with transformers and gguf installed, \
         run: {FROM_GGUF} {folder} {name} {out}"
    )
}

/// A path as a shell takes it.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+@:,".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) {
        return text;
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}
