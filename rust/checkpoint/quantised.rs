//! Checkpoints whose numbers are packed, recognised so that they can be refused by name.
//!
//! A quantised weight is stored as integers that mean nothing without their scales, or in a float
//! type too narrow to compute in. Averaging the stored integers would run without an error and
//! give noise. The configuration says what it is; where there is none, the tensors do.

use std::fmt;
use std::path::Path;

use serde::Deserializer;
use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::{Checkpoint, DOWNLOAD_AGAIN, json, read_text};
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
    let text = read_text(&path)?.0;
    match declared(&json::without_infinities(&text)) {
        Err(error) => {
            let message = format!("the file is not valid JSON: {error}");
            Err(Error::checkpoint(message).file(&path).advice(DOWNLOAD_AGAIN))
        }
        Ok(Some(method)) => Err(refuse(&method)
            .file(&path)
            .advice(format!("{ADVICE}; if it is, remove `quantization_config` from config.json"))),
        Ok(None) => Ok(()),
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

/// The method of the quantisation that a config declares, at its top or in one of its parts (a text
/// model). Everything else in it is skipped.
fn declared(config: &str) -> Result<Option<String>, serde_json::Error> {
    let mut deserializer = serde_json::Deserializer::from_str(config);
    let method = Within::Config.deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(method)
}

/// Where in a config a value is; as a visitor, it looks for a quantisation in the value.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Within {
    /// It is the config.
    Config,
    /// It is a part of it.
    Part,
    /// It is what declares a quantisation.
    Declaration,
    /// It is the name of the method.
    Method,
}

impl Within {
    /// What a value means that is no object and has no name in it.
    fn nameless(self) -> Option<String> {
        (self == Self::Declaration).then(|| "an unnamed method".to_owned())
    }
}

impl<'de> DeserializeSeed<'de> for Within {
    type Value = Option<String>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Within {
    type Value = Option<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self::Value, E> {
        Ok(self.nameless())
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self::Value, E> {
        Ok(self.nameless())
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self::Value, E> {
        Ok(self.nameless())
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self::Value, E> {
        Ok(self.nameless())
    }

    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        Ok(if self == Self::Method { Some(text.to_owned()) } else { self.nameless() })
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(self.nameless())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let (mut own, mut inner) = (None, None);
        while let Some(key) = map.next_key::<String>()? {
            match (self, key.as_str()) {
                (Self::Config | Self::Part, "quantization_config") => {
                    own = map.next_value_seed(Self::Declaration)?;
                }
                (Self::Config, _) => inner = inner.or(map.next_value_seed(Self::Part)?),
                (Self::Declaration, "quant_method") => own = map.next_value_seed(Self::Method)?,
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    // Early bitsandbytes configurations do not name their method.
                    let is_sign = matches!(key.as_str(), "load_in_4bit" | "load_in_8bit");
                    if self == Self::Declaration && is_sign {
                        inner = Some("bitsandbytes".to_owned());
                    }
                }
            }
        }
        Ok(own.or(inner).or(self.nameless()))
    }
}

#[cold]
fn refuse(method: &str) -> Error {
    Error::new(ErrorKind::Unsupported, format!("the checkpoint is quantised ({method})"))
}
