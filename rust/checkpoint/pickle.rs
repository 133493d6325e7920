//! The pickle of a torch file, of which nothing runs.
//!
//! A pickle is a program for a small stack machine, and may name any function of Python and have it
//! called. Here a name is one of the few in [`NAMES`], which is what `torch.save` writes for a
//! dictionary of tensors; the machine knows what each would give, and any other name is refused, as
//! is any instruction that such a file does not need. What is no tensor, dictionary, number or text
//! is opaque: it is there, and nobody looks into it.
//!
//! Everything is kept in tables, by number, so that no value is inside another: a pickle can nest
//! and repeat what it likes, without recursion here. [`MOST_VALUES`] bounds the tables.

use super::bytes::Bytes;
use crate::error::{Error, ErrorKind, Result};

/// The most values that are kept. A tensor takes about thirty.
const MOST_VALUES: usize = 8 << 20;
/// What may be said of how a tensor differs from its storage.
const MOST_CHANGES: usize = 16;
/// The most values that wait on the stack; torch has some thousands there.
const MOST_WAITING: usize = 1 << 20;
/// The newest version of the format; torch writes 2.
const NEWEST: u8 = 5;

/// A value. It is copied freely; what it refers to is in the tables of a [`Pickle`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Value {
    None,
    Bool(bool),
    Int(i64),
    /// Bytes of the pickle, which should be UTF-8.
    Text(Span),
    Name(Name),
    /// Some of the items.
    Tuple(Span),
    Dict(u32),
    Storage(u32),
    Tensor(u32),
    /// Lists, floats, long integers, and what else has no meaning here.
    Opaque,
}

/// The keys and values of a dictionary, in order; a key may be there twice.
pub(super) type Dict = [(Value, Value)];

/// A part of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    start: u32,
    count: u32,
}

/// What a name of Python stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Name {
    /// Makes a tensor of a storage; whether its type is given rather than that of the storage.
    Rebuild {
        typed: bool,
    },
    /// Makes a parameter, which is the tensor that it is made of.
    Parameter,
    /// Calls a function that makes a tensor, for a class of tensors.
    FromType,
    /// The class of plain tensors, or of parameters.
    TensorClass,
    OrderedDict,
    Size,
    Device,
    /// An element type, by its index in [`ELEMENTS`].
    Element(u8),
    /// The class of storages of such elements.
    Typed(u8),
    /// The class of storages of bytes.
    Untyped,
}

/// The names that may stand in a pickle, besides element types and storages of torch.
const NAMES: [(&str, &str, Name); 14] = [
    ("torch._utils", "_rebuild_tensor", Name::Rebuild { typed: false }),
    ("torch._utils", "_rebuild_tensor_v2", Name::Rebuild { typed: false }),
    ("torch._utils", "_rebuild_tensor_v3", Name::Rebuild { typed: true }),
    ("torch._utils", "_rebuild_parameter", Name::Parameter),
    ("torch._utils", "_rebuild_parameter_with_state", Name::Parameter),
    ("torch._tensor", "_rebuild_from_type_v2", Name::FromType),
    ("torch", "Tensor", Name::TensorClass),
    ("torch._tensor", "Tensor", Name::TensorClass),
    ("torch.nn.parameter", "Parameter", Name::TensorClass),
    ("collections", "OrderedDict", Name::OrderedDict),
    ("torch", "Size", Name::Size),
    ("torch", "device", Name::Device),
    ("torch", "UntypedStorage", Name::Untyped),
    ("torch.storage", "UntypedStorage", Name::Untyped),
];

/// Element types: what safetensors calls them, what torch calls them and, where there are, storages
/// of them.
pub(super) const ELEMENTS: [(&str, &str, &str); 22] = [
    ("F64", "float64", "DoubleStorage"),
    ("F32", "float32", "FloatStorage"),
    ("F16", "float16", "HalfStorage"),
    ("BF16", "bfloat16", "BFloat16Storage"),
    ("I64", "int64", "LongStorage"),
    ("I32", "int32", "IntStorage"),
    ("I16", "int16", "ShortStorage"),
    ("I8", "int8", "CharStorage"),
    ("U8", "uint8", "ByteStorage"),
    ("BOOL", "bool", "BoolStorage"),
    ("U16", "uint16", ""),
    ("U32", "uint32", ""),
    ("U64", "uint64", ""),
    ("C64", "complex64", "ComplexFloatStorage"),
    ("C128", "complex128", "ComplexDoubleStorage"),
    ("C32", "complex32", ""),
    ("F8_E4M3", "float8_e4m3fn", ""),
    ("F8_E4M3FNUZ", "float8_e4m3fnuz", ""),
    ("F8_E5M2", "float8_e5m2", ""),
    ("F8_E5M2FNUZ", "float8_e5m2fnuz", ""),
    ("F8_E8M0", "float8_e8m0fnu", ""),
    ("F4", "float4_e2m1fn_x2", ""),
];

/// A tensor as the pickle describes it; nothing of it is checked.
#[derive(Clone, Copy, Debug)]
pub(super) struct RawTensor {
    /// The number of its storage.
    pub(super) storage: u32,
    /// Elements of the storage before its first.
    pub(super) offset: i64,
    shape: Span,
    strides: Span,
    /// The index of its element type in [`ELEMENTS`], if it is given.
    pub(super) element: Option<u8>,
    /// Whether torch would conjugate or negate it when it is used.
    pub(super) is_changed: bool,
}

/// A storage as the pickle describes it.
#[derive(Clone, Copy, Debug)]
pub(super) struct RawStorage {
    /// The last part of the name of its entry.
    pub(super) key: Span,
    /// The index of its element type in [`ELEMENTS`]; without one it is of bytes.
    pub(super) element: Option<u8>,
    /// How many elements it has.
    pub(super) count: i64,
}

/// A pickle that was read: the value it is, and the tables that values refer to.
#[derive(Debug)]
pub(super) struct Pickle<'a> {
    text: &'a [u8],
    pub(super) root: Value,
    items: Vec<Value>,
    dicts: Vec<Vec<(Value, Value)>>,
    pub(super) storages: Vec<RawStorage>,
    pub(super) tensors: Vec<RawTensor>,
}

impl<'a> Pickle<'a> {
    /// Reads a pickle, which has less than 4 GiB.
    pub(super) fn read(text: &'a [u8]) -> Result<Self> {
        let tables = Self {
            text,
            root: Value::None,
            items: Vec::new(),
            dicts: Vec::new(),
            storages: Vec::new(),
            tensors: Vec::new(),
        };
        let mut machine = Machine {
            rest: Bytes(text),
            tables,
            stack: Vec::new(),
            marks: Vec::new(),
            memo: Vec::new(),
            kept: 0,
        };
        machine.run().map_err(|error| {
            let at = text.len() - machine.rest.0.len();
            if error.parts().found.is_none() {
                return error.found(format_args!("that before byte {at} of the pickle"));
            }
            error
        })?;
        Ok(machine.tables)
    }

    /// The text that a value is.
    pub(super) fn text(&self, value: Value) -> Option<&'a str> {
        match value {
            Value::Text(span) => std::str::from_utf8(self.bytes(span)).ok(),
            _ => None,
        }
    }

    /// Bytes of the pickle.
    pub(super) fn bytes(&self, span: Span) -> &'a [u8] {
        &self.text[span.start as usize..][..span.count as usize]
    }

    /// The keys and values that a value has, if it is a dictionary.
    pub(super) fn dict(&self, value: Value) -> Option<&Dict> {
        match value {
            Value::Dict(number) => Some(&self.dicts[number as usize]),
            _ => None,
        }
    }

    /// Shape and strides of a tensor, as numbers; `None` if they are none, or differ in length.
    pub(super) fn layout(&self, tensor: &RawTensor) -> Option<Vec<(u64, u64)>> {
        let number = |&value: &Value| match value {
            Value::Int(number) => u64::try_from(number).ok(),
            _ => None,
        };
        let (shape, strides) = (self.items(tensor.shape), self.items(tensor.strides));
        let pairs =
            shape.iter().zip(strides).map(|(n, stride)| Some((number(n)?, number(stride)?)));
        if shape.len() == strides.len() { pairs.collect() } else { None }
    }

    fn items(&self, span: Span) -> &[Value] {
        &self.items[span.start as usize..][..span.count as usize]
    }
}

/// The machine that a pickle is a program for.
struct Machine<'a> {
    rest: Bytes<'a>,
    tables: Pickle<'a>,
    stack: Vec<Value>,
    /// Where in the stack the values begin that wait for one instruction.
    marks: Vec<usize>,
    /// The values that the pickle comes back to.
    memo: Vec<Value>,
    /// How many values are in the tables and the memo.
    kept: usize,
}

impl Machine<'_> {
    fn run(&mut self) -> Result<()> {
        loop {
            let instruction = self.rest.u8().ok_or_else(ends)?;
            if instruction == b'.' {
                self.tables.root = self.pop()?;
                return Ok(());
            }
            self.step(instruction)?;
        }
    }

    /// Does what an instruction says. Their names are those of Python's `pickletools`.
    fn step(&mut self, instruction: u8) -> Result<()> {
        match instruction {
            // PROTO
            0x80 => match self.rest.u8().ok_or_else(ends)? {
                version if version > NEWEST => Err(wrong("the pickle is of an unknown version")
                    .expected(format_args!("at most {NEWEST}"))
                    .found(version)),
                _ => Ok(()),
            },
            // FRAME
            0x95 => self.rest.u64().map(|_| ()).ok_or_else(ends),
            // MARK
            b'(' => {
                check_waiting(self.marks.len())?;
                self.marks.push(self.stack.len());
                Ok(())
            }
            // GLOBAL, INST, STACK_GLOBAL
            b'c' | b'i' | 0x93 => {
                let name = self.name(instruction)?;
                self.push(Value::Name(name))
            }
            // REDUCE, BUILD, BINPERSID
            b'R' => {
                let (arguments, function) = (self.pop()?, self.pop()?);
                let value = self.call(function, arguments)?;
                self.push(value)
            }
            b'b' => match (self.pop()?, self.stack.last()) {
                (_, Some(Value::Dict(_))) => Ok(()), // its attributes, such as `_metadata`
                _ => Err(wrong("the pickle sets the state of what is no dictionary")),
            },
            b'Q' => {
                let value = self.pop()?;
                let storage = self.storage(value)?;
                self.push(storage)
            }
            // NONE, NEWTRUE, NEWFALSE
            b'N' => self.push(Value::None),
            0x88 => self.push(Value::Bool(true)),
            0x89 => self.push(Value::Bool(false)),
            // BININT, BININT1, BININT2, LONG1, BINFLOAT
            b'J' => self.push_int(4),
            b'K' => self.push_unsigned(1),
            b'M' => self.push_unsigned(2),
            0x8a => {
                let length = self.rest.u8().ok_or_else(ends)?;
                self.push_int(length.into())
            }
            b'G' => {
                self.rest.u64().ok_or_else(ends)?;
                self.push(Value::Opaque)
            }
            // BINUNICODE, SHORT_BINUNICODE, BINUNICODE8, SHORT_BINSTRING
            b'X' => self.push_text(4),
            0x8c | b'U' => self.push_text(1),
            0x8d => self.push_text(8),
            // EMPTY_TUPLE, TUPLE1, TUPLE2, TUPLE3, TUPLE
            b')' => self.push_tuple(0),
            0x85..=0x87 => self.push_tuple(usize::from(instruction - 0x84)),
            b't' => {
                let start = self.mark()?;
                self.push_tuple(self.stack.len() - start)
            }
            // EMPTY_LIST, EMPTY_SET, APPEND, APPENDS, ADDITEMS
            b']' | 0x8f => self.push(Value::Opaque),
            b'a' => {
                self.pop()?;
                self.appended()
            }
            b'e' | 0x90 => {
                let start = self.mark()?;
                self.stack.truncate(start);
                self.appended()
            }
            // EMPTY_DICT, SETITEM, SETITEMS
            b'}' => {
                let dict = self.new_dict()?;
                self.push(dict)
            }
            b's' => self.set_items(self.stack.len().saturating_sub(2)),
            b'u' => {
                let start = self.mark()?;
                self.set_items(start)
            }
            // BINPUT, LONG_BINPUT, MEMOIZE, BINGET, LONG_BINGET
            b'q' => {
                let at = self.rest.u8().ok_or_else(ends)?;
                self.remember(at.into())
            }
            b'r' => {
                let at = self.rest.u32().ok_or_else(ends)?;
                self.remember(at as usize)
            }
            0x94 => self.remember(self.memo.len()),
            b'h' => {
                let at = self.rest.u8().ok_or_else(ends)?;
                self.recall(at.into())
            }
            b'j' => {
                let at = self.rest.u32().ok_or_else(ends)?;
                self.recall(at as usize)
            }
            other => Err(unknown(other)),
        }
    }

    // The stack.

    fn push(&mut self, value: Value) -> Result<()> {
        check_waiting(self.stack.len())?;
        self.stack.push(value);
        Ok(())
    }

    /// Takes the top of the stack, which no mark lies on.
    fn pop(&mut self) -> Result<Value> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let value = if self.stack.len() > floor { self.stack.pop() } else { None };
        value.ok_or_else(|| wrong("the pickle takes a value that is not there"))
    }

    /// Where the values begin that came since the last mark, which is taken.
    fn mark(&mut self) -> Result<usize> {
        self.marks.pop().ok_or_else(|| wrong("the pickle takes a mark that is not there"))
    }

    /// Counts values that are kept.
    fn keep(&mut self, values: usize) -> Result<()> {
        self.kept += values;
        if self.kept > MOST_VALUES {
            return Err(Error::new(ErrorKind::Unsupported, "the pickle has too many values")
                .expected(format_args!("at most {MOST_VALUES}, as of 250,000 tensors"))
                .found("more"));
        }
        Ok(())
    }

    fn remember(&mut self, at: usize) -> Result<()> {
        let value = self.pop()?;
        self.push(value)?;
        if at > self.memo.len() {
            return Err(wrong("the pickle numbers its values out of order")
                .expected(self.memo.len())
                .found(at));
        }
        if at == self.memo.len() {
            self.keep(1)?;
            self.memo.push(value);
        }
        self.memo[at] = value;
        Ok(())
    }

    fn recall(&mut self, at: usize) -> Result<()> {
        let value = self.memo.get(at).copied();
        self.push(value.ok_or_else(|| wrong("the pickle comes back to a value that is not there"))?)
    }

    // Values.

    fn push_unsigned(&mut self, length: usize) -> Result<()> {
        let number = unsigned(self.rest.take(length).ok_or_else(ends)?);
        self.push(Value::Int(number as i64))
    }

    /// Pushes a number with a sign; a long one has no meaning here.
    fn push_int(&mut self, length: usize) -> Result<()> {
        let bytes = self.rest.take(length).ok_or_else(ends)?;
        let unused = 64 - 8 * bytes.len().clamp(1, 8);
        let number = (unsigned(bytes.get(..8).unwrap_or(bytes)) << unused) as i64 >> unused;
        self.push(if bytes.len() > 8 { Value::Opaque } else { Value::Int(number) })
    }

    /// Pushes a text behind its length, which is a number of so many bytes.
    fn push_text(&mut self, width: usize) -> Result<()> {
        let count = unsigned(self.rest.take(width).ok_or_else(ends)?);
        let start = self.tables.text.len() - self.rest.0.len();
        let count = usize::try_from(count).map_err(|_| ends())?;
        self.rest.take(count).ok_or_else(ends)?;
        self.push(Value::Text(Span { start: start as u32, count: count as u32 }))
    }

    fn push_tuple(&mut self, count: usize) -> Result<()> {
        self.keep(count)?;
        let floor = self.marks.last().copied().unwrap_or(0);
        let start = self.stack.len().checked_sub(count).filter(|&start| start >= floor);
        let start = start.ok_or_else(|| wrong("the pickle takes a value that is not there"))?;
        let span = Span { start: self.tables.items.len() as u32, count: count as u32 };
        self.tables.items.extend(self.stack.drain(start..));
        self.push(Value::Tuple(span))
    }

    fn new_dict(&mut self) -> Result<Value> {
        self.keep(2)?;
        self.tables.dicts.push(Vec::new());
        Ok(Value::Dict(self.tables.dicts.len() as u32 - 1))
    }

    /// Puts the keys and values from `start` of the stack on into the dictionary below them.
    fn set_items(&mut self, start: usize) -> Result<()> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let below = start.checked_sub(1).filter(|&below| below >= floor);
        let Some(Value::Dict(dict)) = below.map(|below| self.stack[below]) else {
            return Err(wrong("the pickle puts keys into what is no dictionary"));
        };
        let (pairs, []) = self.stack[start..].as_chunks::<2>() else {
            return Err(wrong("the pickle has a key without a value"));
        };
        self.tables.dicts[dict as usize].extend(pairs.iter().map(|&[key, value]| (key, value)));
        let pairs = pairs.len();
        self.stack.truncate(start);
        self.keep(2 * pairs)
    }

    /// Checks that what was added to is something that can grow.
    fn appended(&self) -> Result<()> {
        match self.stack.last() {
            Some(Value::Opaque) => Ok(()),
            _ => Err(wrong("the pickle adds to what is no list")),
        }
    }

    // Names and what they do.

    /// What the name stands for that an instruction brings or takes.
    fn name(&mut self, instruction: u8) -> Result<Name> {
        if instruction == 0x93 {
            let (name, module) = (self.pop()?, self.pop()?);
            return match (module, name) {
                (Value::Text(module), Value::Text(name)) => {
                    name_of(self.tables.bytes(module), self.tables.bytes(name))
                }
                _ => Err(wrong("the pickle has a name that is no text")),
            };
        }
        let module = self.rest.until(b'\n').ok_or_else(ends)?;
        let name = self.rest.until(b'\n').ok_or_else(ends)?;
        let name = name_of(module, name)?;
        // INST would call it, too.
        if instruction == b'i' { Err(unknown(instruction)) } else { Ok(name) }
    }

    /// What a call of a function gives.
    fn call(&mut self, function: Value, arguments: Value) -> Result<Value> {
        let (Value::Name(name), Value::Tuple(span)) = (function, arguments) else {
            return Err(wrong("the pickle calls what is no function"));
        };
        let arguments = self.tables.items(span);
        match (name, arguments) {
            (Name::Rebuild { typed }, _) => self.tensor(span, typed),
            (Name::Parameter, &[tensor @ Value::Tensor(_), ..]) => Ok(tensor),
            (
                Name::FromType,
                &[
                    Value::Name(Name::Rebuild { typed }),
                    Value::Name(Name::TensorClass),
                    Value::Tuple(inner),
                    _,
                ],
            ) => self.tensor(inner, typed),
            (Name::FromType, &[Value::Name(Name::Parameter), _, Value::Tuple(inner), _]) => {
                match self.tables.items(inner) {
                    &[tensor @ Value::Tensor(_), ..] => Ok(tensor),
                    _ => Err(wrong("the pickle makes a parameter of what is no tensor")),
                }
            }
            (Name::OrderedDict, []) => self.new_dict(),
            (Name::Size, &[size @ Value::Tuple(_)]) => Ok(size),
            (Name::Device, _) => Ok(Value::Opaque),
            _ => Err(wrong("the pickle calls a function in an unknown way")
                .found(format_args!("{name:?}"))),
        }
    }

    /// A tensor by what it is rebuilt from: storage, offset, shape, strides, whether it needs a
    /// gradient, hooks; its type, if that is `typed`; and perhaps how it is changed when it is used.
    fn tensor(&mut self, arguments: Span, typed: bool) -> Result<Value> {
        let arguments = self.tables.items(arguments);
        let [
            Value::Storage(storage),
            Value::Int(offset),
            Value::Tuple(shape),
            Value::Tuple(strides),
            rest @ ..,
        ] = arguments
        else {
            return Err(wrong("the pickle makes a tensor in an unknown way"));
        };
        let rest = rest.get(2..).unwrap_or(&[]);
        let (element, changes) = match (typed, rest) {
            (false, changes) => (None, changes),
            (true, [Value::Name(Name::Element(element)), changes @ ..]) => {
                (Some(*element), changes)
            }
            (true, _) => return Err(wrong("the pickle makes a tensor without a type")),
        };
        let is_changed = match changes {
            [] | [Value::None] => false,
            // Whether it is conjugated, or negative: to look through many would take for ever.
            [Value::Dict(changes)]
                if self.tables.dicts[*changes as usize].len() <= MOST_CHANGES =>
            {
                let mut values = self.tables.dicts[*changes as usize].iter();
                values.any(|(_, value)| *value != Value::Bool(false))
            }
            _ => return Err(wrong("the pickle makes a tensor in an unknown way")),
        };
        let tensor = RawTensor {
            storage: *storage,
            offset: *offset,
            shape: *shape,
            strides: *strides,
            element,
            is_changed,
        };
        self.keep(2)?;
        self.tables.tensors.push(tensor);
        Ok(Value::Tensor(self.tables.tensors.len() as u32 - 1))
    }

    /// The storage that a persistent id stands for: a word, its class, its key, a device, and how
    /// many elements it has.
    fn storage(&mut self, id: Value) -> Result<Value> {
        let items = match id {
            Value::Tuple(span) => self.tables.items(span),
            _ => &[],
        };
        let &[Value::Text(word), Value::Name(class), Value::Text(key), _, Value::Int(count)] =
            items
        else {
            return Err(wrong("the pickle has a storage that is described in an unknown way"));
        };
        let element = match class {
            Name::Typed(element) => Some(element),
            Name::Untyped => None,
            _ => return Err(wrong("the pickle has a storage of an unknown class")),
        };
        if self.tables.bytes(word) != b"storage" {
            return Err(wrong("the pickle refers to something else than a storage"));
        }
        self.keep(2)?;
        self.tables.storages.push(RawStorage { key, element, count });
        Ok(Value::Storage(self.tables.storages.len() as u32 - 1))
    }
}

/// What a name of a module stands for; an error that says it if it may not be there.
fn name_of(module: &[u8], name: &[u8]) -> Result<Name> {
    let known = |&(its_module, its_name, _): &&(&str, &str, Name)| {
        module == its_module.as_bytes() && name == its_name.as_bytes()
    };
    if let Some(&(.., known)) = NAMES.iter().find(known) {
        return Ok(known);
    }
    if module == b"torch" {
        let is = |text: &str| !text.is_empty() && name == text.as_bytes();
        if let Some(element) = ELEMENTS.iter().position(|&(_, name, _)| is(name)) {
            return Ok(Name::Element(element as u8));
        }
        if let Some(element) = ELEMENTS.iter().position(|&(.., storage)| is(storage)) {
            return Ok(Name::Typed(element as u8));
        }
    }
    Err(refused(&format!("{}.{}", module.escape_ascii(), name.escape_ascii())))
}

fn check_waiting(count: usize) -> Result<()> {
    if count < MOST_WAITING {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Unsupported, "the pickle has too many values that wait")
        .expected(format_args!("at most {MOST_WAITING}"))
        .found("more"))
}

/// A number of up to eight bytes.
fn unsigned(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

/// The refusal of a name.
#[cold]
fn refused(name: &str) -> Error {
    let (what, advice) = match name {
        "torch._utils._rebuild_qtensor" => {
            ("quantised tensors cannot be merged", "dequantise the model first")
        }
        "torch._utils._rebuild_sparse_tensor" => {
            ("sparse tensors cannot be merged", "save the model with dense tensors")
        }
        "torch._utils._rebuild_meta_tensor_no_storage" => {
            ("a tensor on the meta device has no numbers", "save the model with its weights loaded")
        }
        _ => (
            "the file asks for code that is not run",
            "save the model as a dictionary of tensors (`torch.save(model.state_dict(), FILE)`); \
             be careful with this file if it is not yours",
        ),
    };
    Error::new(ErrorKind::Unsupported, what).found(format_args!("`{name}`")).advice(advice)
}

#[cold]
fn unknown(instruction: u8) -> Error {
    Error::new(ErrorKind::Unsupported, "the pickle has an instruction that no state dict needs")
        .found(format_args!("`{}`", instruction.escape_ascii()))
}

#[cold]
fn ends() -> Error {
    wrong("the pickle ends inside an instruction")
}

#[cold]
fn wrong(message: &str) -> Error {
    Error::checkpoint(message)
}
