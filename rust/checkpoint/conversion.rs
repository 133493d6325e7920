//! What to do about weights in another format than safetensors: a command that converts them.

use std::path::Path;

/// Endings of weights in other formats, and whether torch reads them.
const FORMATS: [(&str, bool); 8] = [
    (".bin", true),
    (".pt", true),
    (".pth", true),
    (".ckpt", true),
    (GGUF, false),
    (".msgpack", false),
    (".h5", false),
    (".onnx", false),
];
const GGUF: &str = ".gguf";

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

/// More files than that are written as a pattern.
const LISTED: usize = 3;

const FROM_TORCH: &str = "python -c \"import sys, torch; from safetensors.torch import save_file; \
    save_file({name: tensor.contiguous().clone() for file in sys.argv[2:] for name, tensor in \
    torch.load(file, map_location='cpu', weights_only=True).items()}, sys.argv[1], \
    {'format': 'pt'})\"";
const FROM_GGUF: &str = "python -c \"import sys; from transformers import AutoModelForCausalLM as M; \
    M.from_pretrained(sys.argv[1], gguf_file=sys.argv[2]).save_pretrained(sys.argv[3])\"";

/// Of the names in a directory those of weights in other formats.
pub(super) fn foreign(names: &[String]) -> Vec<&str> {
    let is_state = |name: &str| TRAINING.iter().any(|beginning| name.starts_with(beginning));
    let is_foreign = |name: &str| FORMATS.iter().any(|(ending, _)| name.ends_with(ending));
    names.iter().map(String::as_str).filter(|name| is_foreign(name) && !is_state(name)).collect()
}

/// What to do about weights in `directory`, by their names in order.
pub(super) fn advice(directory: &Path, names: &[&str]) -> String {
    let torch = |name: &&str| FORMATS.iter().any(|(e, torch)| *torch && name.ends_with(e));
    let readable: Vec<_> = names.iter().copied().filter(torch).collect();
    // Llama's own format cuts each tensor into several files, which no program here joins.
    let is_cut = readable.len() > 1 && readable.iter().all(|name| name.starts_with("consolidated"));
    if !readable.is_empty() && !is_cut {
        let out = quoted(&directory.join("model.safetensors"));
        return from_torch(&out, &arguments(directory, &readable));
    }
    match names.iter().find(|name| name.ends_with(GGUF)) {
        Some(name) => from_gguf(&directory.join(name)),
        None => "download the model's weights in safetensors or PyTorch format".to_owned(),
    }
}

/// What to do about a zip archive or a pickle, which torch may have written.
pub(super) fn torch_file(path: &Path) -> String {
    from_torch(&quoted(&path.with_extension("safetensors")), &quoted(path))
}

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

fn from_torch(out: &str, files: &str) -> String {
    format!("with torch and safetensors installed, run: {FROM_TORCH} {out} {files}")
}

/// The files as a shell takes them, each by its name or all by one pattern.
fn arguments(directory: &Path, names: &[&str]) -> String {
    if let ([first, .., last], true) = (names, names.len() > LISTED) {
        let shared = first.char_indices().zip(last.chars()).find(|((_, a), b)| a != b);
        let beginning = shared.map_or(*first, |((at, _), _)| &first[..at]);
        let ending = first.rsplit_once('.').map_or("", |(_, ending)| ending);
        return format!("{}*.{ending}", quoted(&directory.join(beginning)));
    }
    let files: Vec<_> = names.iter().map(|name| quoted(&directory.join(name))).collect();
    files.join(" ")
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
