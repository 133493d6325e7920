//! Checkpoints whose numbers are packed, recognised so that they can be refused by name.
//!
//! A quantised weight is stored as integers that mean nothing without their scales, or in a float
//! type too narrow to compute in. Averaging the stored integers would run without an error and
//! give noise. The configuration says what it is; where there is none, the tensors do.

use std::path::Path;

use serde_json::Value;

use super::{Checkpoint, DOWNLOAD_AGAIN, read_text};
use crate::dtype::DType;
use crate::error::{Error, ErrorKind, Result};

const ADVICE: &str = "dequantise it to BF16 first";
const COMPLEX_ADVICE: &str = "leave the model out: only real numbers can be merged";

/// Beginnings of the type names that safetensors knows and oxmerge does not carry.
const DTYPES: [(&str, &str); 6] = [
    ("F8_", "8-bit float weights (FP8)"),
    ("F6_", "6-bit float weights (FP6)"),
    ("F4", "4-bit float weights (FP4)"),
    ("I4", "packed 4-bit integers"),
    ("U4", "packed 4-bit integers"),
    ("C", "complex numbers"),
];

/// A pair of tensors that gives a packing away: the ending and type of one, the ending of the
/// other, and the packing's name.
const SIGNS: [(&str, &[DType], &str, &str); 7] = [
    (".qweight", &[DType::I32], ".g_idx", "GPTQ"),
    (".qweight", &[DType::I32], ".qzeros", "AWQ or GPTQ"),
    (".weight", &[DType::U8], ".weight.absmax", "bitsandbytes 4-bit"),
    (".weight", &[DType::I8], ".SCB", "bitsandbytes 8-bit"),
    (".weight", &[DType::I8], ".weight_scale", "compressed-tensors 8-bit"),
    (".weight_packed", &[DType::I32, DType::U8], ".weight_scale", "compressed-tensors"),
    ("_blocks", &[DType::U8], "_scales", "MXFP4"),
];

/// The error for a type that [`DType`] does not know.
#[cold]
pub(super) fn refuse_dtype(name: &str) -> Error {
    match DTYPES.iter().find(|(beginning, _)| name.starts_with(beginning)) {
        Some((_, what)) => {
            let error = Error::new(ErrorKind::Unsupported, format!("{what} cannot be merged"))
                .found(format_args!("`{name}`"));
            error.advice(if name.starts_with('C') { COMPLEX_ADVICE } else { ADVICE })
        }
        None => Error::checkpoint("the tensor's type is unknown")
            .found(format_args!("`{}`", name.escape_debug()))
            .advice("save the model in a type that merges: BF16, F16, F32 or F64"),
    }
}

/// Refuses a directory whose `config.json` declares a quantisation.
pub(super) fn refuse_config(directory: &Path) -> Result<()> {
    let path = directory.join("config.json");
    if !path.exists() {
        return Ok(());
    }
    let config: Value = serde_json::from_str(&read_text(&path)?.0).map_err(|error| {
        Error::checkpoint(format!("the file is not valid JSON: {error}"))
            .file(&path)
            .advice(DOWNLOAD_AGAIN)
    })?;
    match declared(&config) {
        Some(method) => Err(refuse(&method)
            .file(&path)
            .advice(format!("{ADVICE}; if it is, remove `quantization_config` from config.json"))),
        None => Ok(()),
    }
}

/// Refuses a checkpoint whose tensors are recognised as packed.
pub(super) fn refuse_tensors(checkpoint: &Checkpoint) -> Result<()> {
    for tensor in checkpoint.tensors() {
        let sign = SIGNS.iter().find(|(ending, dtypes, companion, _)| {
            dtypes.contains(&tensor.dtype)
                && tensor
                    .name
                    .strip_suffix(ending)
                    .is_some_and(|stem| checkpoint.get(&format!("{stem}{companion}")).is_some())
        });
        if let Some((.., method)) = sign {
            return Err(refuse(method)
                .file(&checkpoint.files[tensor.file].path)
                .tensor(tensor.name)
                .advice(ADVICE));
        }
    }
    Ok(())
}

/// The quantisation that a config declares, at its top or in one of its parts (a text model).
fn declared(config: &Value) -> Option<String> {
    let parts = config.as_object()?.values();
    std::iter::once(config)
        .chain(parts)
        .filter_map(|part| part.get("quantization_config"))
        .find(|declaration| !declaration.is_null())
        .map(method)
}

/// The declaration's method; early bitsandbytes configurations do not name theirs.
fn method(declaration: &Value) -> String {
    let named = declaration.get("quant_method").and_then(Value::as_str);
    let bits = |key| declaration.get(key).is_some();
    match named {
        Some(name) => name.to_owned(),
        None if bits("load_in_4bit") || bits("load_in_8bit") => "bitsandbytes".to_owned(),
        None => "an unnamed method".to_owned(),
    }
}

#[cold]
fn refuse(method: &str) -> Error {
    Error::new(ErrorKind::Unsupported, format!("the checkpoint is quantised ({method})"))
}
