//! Arrays of Python, as the objects that own them: what is read and written is what they export.
//!
//! An object hands out its memory by the buffer protocol, or is a tensor of torch, which has `DLPack`
//! instead. Where the memory lies, how much there is, what it holds and whether it may be written to
//! comes from the object alone, and it is held for the time of a call. So whatever a program passes,
//! nothing is touched that is not there.

#![expect(unsafe_code, reason = "DLPack is a C structure, behind functions that torch hands out")]

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ops::Range;

use pyo3::buffer::{ElementType, PyUntypedBuffer};
use pyo3::exceptions::{PyBufferError, PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyCapsule, PyTuple, PyType};

use crate::dtype::DType;
use crate::io;

/// An array as Python hands it over: the object that owns it; or a pair of that and an element type,
/// where its own is another of the same size. (`NumPy` cannot export bfloat16, only its bits.)
pub(super) struct Given<'py> {
    object: Bound<'py, PyAny>,
    dtype: Option<DType>,
}

impl<'py> FromPyObject<'_, 'py> for Given<'py> {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let Ok(pair) = object.cast::<PyTuple>() else {
            return Ok(Self { object: object.to_owned(), dtype: None });
        };
        let (object, name): (Bound<'py, PyAny>, String) = pair.extract()?;
        let dtype = DType::from_name(&name)
            .ok_or_else(|| PyValueError::new_err(format!("there is no element type `{name}`")))?;
        Ok(Self { object, dtype: Some(dtype) })
    }
}

impl Given<'_> {
    /// Whether both are the same object, taken for the same.
    pub(super) fn is(&self, other: &Self) -> bool {
        self.object.is(&other.object) && self.dtype == other.dtype
    }
}

/// What `inputs` and `out` export; an error unless `out` may be written to.
pub(super) fn export<'py>(
    mut inputs: Vec<Given<'py>>,
    out: Given<'py>,
) -> PyResult<(Vec<Array<'py>>, Array<'py>)> {
    inputs.push(out);
    let mut arrays = export_all(inputs)?;
    let out = arrays.pop().expect("as many as were given");
    out.check_writable()?;
    Ok((arrays, out))
}

/// What `given` export.
pub(super) fn export_all(given: Vec<Given<'_>>) -> PyResult<Vec<Array<'_>>> {
    let torch = given.first().map(|given| Torch::loaded(given.object.py())).transpose()?.flatten();
    let wishes: Vec<Option<DType>> = given.iter().map(|given| given.dtype).collect();
    // To export a buffer may run a program's code, which could give a tensor other memory. So tensors
    // are looked at when that is over.
    let mut arrays = Vec::with_capacity(given.len());
    for Given { object, .. } in given {
        let is_tensor = torch.is_some_and(|torch| torch.knows(&object));
        arrays.push(if is_tensor { Array::of_nothing(object) } else { Array::of_buffer(&object)? });
    }
    for (array, wish) in arrays.iter_mut().zip(wishes) {
        if let (Owner::Tensor { .. }, Some(torch)) = (&array.owner, torch) {
            torch.describe(array)?;
        }
        array.take_for(wish)?;
    }
    Ok(arrays)
}

/// A contiguous array that a Python object owns.
pub(super) struct Array<'py> {
    pub(super) start: *mut u8,
    pub(super) bytes: usize,
    pub(super) dtype: DType,
    dimensions: *const i64,
    rank: usize,
    is_writable: bool,
    owner: Owner<'py>,
}

/// What keeps the memory where it is.
enum Owner<'py> {
    /// The object cannot move or free what it has exported.
    Buffer { _export: PyUntypedBuffer },
    /// A tensor can be given other memory at any time: see [`Held`].
    Tensor { tensor: Bound<'py, PyAny>, capsule: Option<Bound<'py, PyCapsule>> },
}

/// The storages of tensors, which keep their memory when the tensors are given other.
pub(super) struct Held<'py> {
    _storages: Vec<Bound<'py, PyAny>>,
}

/// Whether a read of `arrays` may wait for a disk, since they are maps of files.
pub(super) fn may_wait<'a, 'py: 'a>(arrays: impl IntoIterator<Item = &'a Array<'py>>) -> bool {
    io::are_mapped(arrays.into_iter().map(Array::place))
}

impl<'py> Held<'py> {
    /// Holds the storages of those `arrays` that are tensors; an error if an element lies outside of
    /// them, as of a tensor whose storage was made smaller.
    pub(super) fn of<'a>(arrays: impl IntoIterator<Item = &'a Array<'py>>) -> PyResult<Self>
    where
        'py: 'a,
    {
        let mut held = Vec::new();
        for array in arrays {
            let Owner::Tensor { tensor, .. } = &array.owner else { continue };
            let py = tensor.py();
            let storage = tensor.call_method0(intern!(py, "untyped_storage"))?;
            let start: usize = storage.call_method0(intern!(py, "data_ptr"))?.extract()?;
            let bytes: usize = storage.call_method0(intern!(py, "nbytes"))?.extract()?;
            let place = array.place();
            let is_inside = place.start >= start && place.end <= start + bytes;
            if array.bytes > 0 && !is_inside {
                return Err(no_memory());
            }
            held.push(storage);
        }
        Ok(Self { _storages: held })
    }
}

impl<'py> Array<'py> {
    fn take_for(&mut self, wish: Option<DType>) -> PyResult<()> {
        let dtype = wish.unwrap_or(self.dtype);
        if dtype.size() != self.dtype.size() {
            let message = format!("elements of {} cannot be {dtype}", self.dtype);
            return Err(PyTypeError::new_err(message));
        }
        self.dtype = dtype;
        Ok(())
    }

    /// Of a tensor that is not yet looked at.
    fn of_nothing(tensor: Bound<'py, PyAny>) -> Self {
        Self {
            start: std::ptr::null_mut(),
            bytes: 0,
            dtype: DType::U8,
            dimensions: std::ptr::null(),
            rank: 0,
            is_writable: true,
            owner: Owner::Tensor { tensor, capsule: None },
        }
    }

    fn of_buffer(object: &Bound<'py, PyAny>) -> PyResult<Self> {
        let export = PyUntypedBuffer::get(object)?;
        // Others than plain numbers may be references, which must not be overwritten.
        let dtype = match (export.format().to_bytes().first(), export.item_size()) {
            (Some(b'>' | b'!'), 2..) => None,
            (_, size) => element_type(ElementType::from_format(export.format()), size),
        };
        let dtype = dtype.ok_or_else(|| {
            PyTypeError::new_err(format!("there is no element type `{:?}`", export.format()))
        })?;
        if !export.is_c_contiguous() {
            return Err(not_contiguous());
        }
        Ok(Self {
            start: export.buf_ptr().cast(),
            bytes: export.len_bytes(),
            dtype,
            dimensions: export.shape().as_ptr().cast(),
            rank: export.shape().len(),
            is_writable: !export.readonly(),
            owner: Owner::Buffer { _export: export },
        })
    }

    /// Its shape.
    pub(super) fn shape(&self, _py: Python<'py>) -> &[i64] {
        if self.rank == 0 {
            return &[];
        }
        // SAFETY: the owner keeps as many lengths there. A tensor does as long as nobody changes it,
        // and the slice lives no longer than this thread is attached to Python without a break.
        unsafe { std::slice::from_raw_parts(self.dimensions, self.rank) }
    }

    /// An error unless it may be written to.
    pub(super) fn check_writable(&self) -> PyResult<()> {
        if self.is_writable {
            return Ok(());
        }
        Err(PyValueError::new_err("out is read-only; pass an array that may be written to"))
    }

    pub(super) fn elements(&self) -> u64 {
        (self.bytes / self.dtype.size()) as u64
    }

    /// Addresses of its bytes.
    pub(super) fn place(&self) -> Range<usize> {
        self.start.addr()..self.start.addr() + self.bytes
    }

    pub(super) fn overlaps(&self, other: &Self) -> bool {
        let (one, other) = (self.place(), other.place());
        !one.is_empty() && !other.is_empty() && one.start < other.end && other.start < one.end
    }

    /// Whether both are the same memory.
    pub(super) fn is(&self, other: &Self) -> bool {
        self.start == other.start && self.bytes == other.bytes
    }
}

fn element_type(found: ElementType, size: usize) -> Option<DType> {
    let (dtype, bytes) = match found {
        ElementType::Bool => (DType::Bool, 1),
        ElementType::SignedInteger { bytes } => (signed(bytes)?, bytes),
        ElementType::UnsignedInteger { bytes } => (unsigned(bytes)?, bytes),
        ElementType::Float { bytes } => (float(bytes)?, bytes),
        ElementType::Unknown => return None,
    };
    (bytes == size).then_some(dtype)
}

fn signed(bytes: usize) -> Option<DType> {
    Some(match bytes {
        1 => DType::I8,
        2 => DType::I16,
        4 => DType::I32,
        8 => DType::I64,
        _ => return None,
    })
}

fn unsigned(bytes: usize) -> Option<DType> {
    Some(match bytes {
        1 => DType::U8,
        2 => DType::U16,
        4 => DType::U32,
        8 => DType::U64,
        _ => return None,
    })
}

fn float(bytes: usize) -> Option<DType> {
    Some(match bytes {
        2 => DType::F16,
        4 => DType::F32,
        8 => DType::F64,
        _ => return None,
    })
}

#[cold]
fn not_contiguous() -> PyErr {
    PyBufferError::new_err("the elements of an array do not follow each other in memory")
}

#[cold]
fn no_memory() -> PyErr {
    PyValueError::new_err(
        "a tensor has no memory of its own for its elements; materialise it first",
    )
}

// Tensors of torch. The structures are those of `dlpack.h`, whose first version is 1.0.

#[repr(C)]
struct DlTensor {
    data: *mut u8,
    device: [i32; 2],
    rank: i32,
    dtype: DlType,
    shape: *const i64,
    strides: *const i64,
    offset: u64,
}

#[repr(C)]
struct DlType {
    code: u8,
    bits: u8,
    lanes: u16,
}

/// The functions of a package that has arrays. It may have more than these.
#[repr(C)]
struct ExchangeApi {
    major: u32,
    minor: u32,
    older: *const c_void,
    allocate: *const c_void,
    export: *const c_void,
    import: *const c_void,
    describe: Option<Describe>,
}

type Describe = unsafe extern "C" fn(object: *mut ffi::PyObject, out: *mut DlTensor) -> c_int;

const EXCHANGE_API: &std::ffi::CStr = c"dlpack_exchange_api";
/// The major version of `DLPack` whose structures these are.
const VERSION: u32 = 1;
/// Devices whose memory is the CPU's: its own, and what is page-locked for CUDA and HIP.
const ON_CPU: [i32; 3] = [1, 3, 11];

/// What of torch is needed. It is never imported from here.
struct Torch {
    tensor: Py<PyType>,
    parameter: Py<PyType>,
    /// From torch 2.10 on: describes a tensor without making anything.
    describe: Option<Describe>,
    to_dlpack: Py<PyAny>,
    /// Keeps `describe` where it is.
    _api: Option<Py<PyAny>>,
}

static TORCH: PyOnceLock<Torch> = PyOnceLock::new();

impl Torch {
    /// Torch, if the program has it.
    fn loaded(py: Python<'_>) -> PyResult<Option<&Self>> {
        if let Some(torch) = TORCH.get(py) {
            return Ok(Some(torch));
        }
        Ok(Self::find(py)?.map(|torch| TORCH.get_or_init(py, || torch)))
    }

    /// Whether `object` is a tensor. Those of other classes need not have memory, nor what they say
    /// they have.
    fn knows(&self, object: &Bound<'_, PyAny>) -> bool {
        let class = object.get_type_ptr().cast();
        class == self.tensor.as_ptr() || class == self.parameter.as_ptr()
    }

    fn find(py: Python<'_>) -> PyResult<Option<Self>> {
        let modules = py.import("sys")?.getattr("modules")?;
        let Ok(torch) = modules.get_item("torch") else { return Ok(None) };
        let (Ok(tensor), Ok(nn)) = (torch.getattr("Tensor"), torch.getattr("nn")) else {
            return Ok(None); // it is being imported
        };
        let api = tensor.getattr("__dlpack_c_exchange_api__").ok();
        let api = api.and_then(|api| api.cast_into::<PyCapsule>().ok());
        let describe = api.as_ref().and_then(|api| {
            let found = api.pointer_checked(Some(EXCHANGE_API)).ok()?.cast::<ExchangeApi>();
            // SAFETY: a capsule of this name holds such a structure, whose beginning is the same in
            // all versions.
            let version = unsafe { (*found.as_ptr()).major };
            // SAFETY: as above, and the rest is of the version that has these fields.
            (version == VERSION).then(|| unsafe { (*found.as_ptr()).describe }).flatten()
        });
        Ok(Some(Self {
            tensor: tensor.cast_into()?.unbind(),
            parameter: nn.getattr("Parameter")?.cast_into()?.unbind(),
            describe,
            to_dlpack: py.import("torch.utils.dlpack")?.getattr("to_dlpack")?.unbind(),
            _api: api.map(|api| api.into_any().unbind()),
        }))
    }

    /// Fills in what a tensor's array is.
    fn describe(&self, array: &mut Array<'_>) -> PyResult<()> {
        let Owner::Tensor { tensor, capsule } = &mut array.owner else { return Ok(()) };
        let py = tensor.py();
        let mut found = MaybeUninit::<DlTensor>::uninit();
        if let Some(describe) = self.describe {
            // SAFETY: it is of the very class that the function was got from, or of that of
            // parameters, which are tensors; and there is room for what it writes.
            if unsafe { describe(tensor.as_ptr(), found.as_mut_ptr()) } != 0 {
                return Err(not_exported(&PyErr::fetch(py)));
            }
        } else {
            let exported = self.to_dlpack.bind(py).call1((&*tensor,));
            let exported = exported.map_err(|error| not_exported(&error))?;
            let exported = exported.cast_into::<PyCapsule>()?;
            let start = exported.pointer_checked(Some(c"dltensor"))?.cast::<DlTensor>();
            // SAFETY: a capsule of this name begins with such a structure. Nobody else has this one,
            // and it is kept as long as what is read from it.
            found.write(unsafe { start.read() });
            *capsule = Some(exported);
        }
        // SAFETY: written by either.
        let found = unsafe { found.assume_init() };
        // A negated view is the imaginary part of a conjugate, which lies in every other place: it
        // follows itself in memory only if it is one number. DLPack does not know of it.
        let is_neg = || tensor.call_method0(intern!(py, "is_neg"))?.is_truthy();
        if found.is_single() && is_neg()? {
            return Err(not_contiguous());
        }
        found.fill_in(array)
    }
}

/// What torch says about a tensor that is not a plain array in memory.
#[cold]
fn not_exported(error: &PyErr) -> PyErr {
    PyBufferError::new_err(format!("a tensor cannot be used where it is: {error}"))
}

impl DlTensor {
    fn lengths(&self, of: *const i64) -> Option<&[i64]> {
        let rank = usize::try_from(self.rank).unwrap_or(0);
        if rank == 0 {
            return Some(&[]);
        }
        // SAFETY: there is one for each dimension, if there are any.
        (!of.is_null()).then(|| unsafe { std::slice::from_raw_parts(of, rank) })
    }

    fn is_single(&self) -> bool {
        self.lengths(self.shape).is_some_and(|shape| shape.iter().all(|&length| length == 1))
    }

    fn fill_in(&self, array: &mut Array<'_>) -> PyResult<()> {
        if !ON_CPU.contains(&self.device[0]) {
            return Err(PyValueError::new_err("a tensor is not on the CPU; copy it there first"));
        }
        let bytes = usize::from(self.dtype.bits / 8);
        let dtype = match self.dtype.code {
            _ if self.dtype.lanes != 1 || !self.dtype.bits.is_multiple_of(8) => None,
            0 => signed(bytes),
            1 => unsigned(bytes),
            2 => float(bytes),
            4 if bytes == 2 => Some(DType::Bf16),
            6 if bytes == 1 => Some(DType::Bool),
            _ => None,
        };
        let dtype = dtype
            .ok_or_else(|| PyTypeError::new_err("a tensor is of a type that has no arithmetic"))?;
        let shape = self.lengths(self.shape).ok_or_else(not_contiguous)?;
        // Older versions have no steps where elements follow each other.
        let steps = self.lengths(self.strides);
        let (mut count, mut is_contiguous) = (1_i64, true);
        for (at, &length) in shape.iter().enumerate().rev() {
            is_contiguous &= length == 1 || steps.is_none_or(|steps| steps[at] == count);
            count = count.checked_mul(length).ok_or_else(not_contiguous)?;
        }
        let bytes = usize::try_from(count).ok().and_then(|count| count.checked_mul(dtype.size()));
        let bytes = bytes.ok_or_else(not_contiguous)?;
        if bytes > 0 && !is_contiguous {
            return Err(not_contiguous());
        }
        if bytes > 0 && self.data.is_null() {
            return Err(no_memory());
        }
        array.start = self.data.wrapping_add(self.offset as usize);
        (array.bytes, array.dtype) = (bytes, dtype);
        (array.dimensions, array.rank) = (self.shape, shape.len());
        Ok(())
    }
}
