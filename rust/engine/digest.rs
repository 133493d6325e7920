//! The digest of an output tensor, and its statistics, while it is made.
//!
//! The digest is the standard BLAKE3 hash of the tensor's bytes as they lie in the file, so that any
//! tool can check it. BLAKE3 hashes the leaves of a binary tree and joins neighbours, so pieces are
//! hashed by whoever has them in the cache, in any order. Sums are added up along the same tree.
//! Hence all of it is the same for any threads, pieces and devices.
//!
//! A *node* is a subtree whose bytes are known: whole cells of 1024 elements, the last of which may be
//! shorter. Two nodes become one when they are the halves of a larger subtree. The units of a pass
//! are finished nearly in order, so few nodes wait at a time. Where pieces of the output meet within
//! a cell, its bytes wait until it is whole.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use blake3::Hasher;
use blake3::hazmat::{
    ChainingValue, HasherExt, Mode, left_subtree_len, max_subtree_len, merge_subtrees_non_root,
    merge_subtrees_root,
};

use super::backend::steps;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernels::{self, BLOCK, CELL, CELLS, Comparison, Level};

/// Bytes that a worker takes for the nodes around its piece, for cells in two pieces, and to round what
/// is compared.
pub(super) const DIGEST_BYTES: u64 = 160 << 10;
/// Elements of a node that is hashed at once: enough for BLAKE3 to use the whole width of its registers,
/// and few enough to be in the second-level cache from when they are computed until they are compared.
pub(super) const AT_ONCE: u64 = BLOCK as u64;
/// Elements that are compared at once.
const COMPARED: u64 = (CELLS * CELL) as u64;
const CELL_ELEMENTS: u64 = CELL as u64;

/// What is known of a finished output tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TensorDigest {
    /// The BLAKE3 hash of its bytes.
    pub blake3: [u8; 32],
    /// Counts and sums, of a float type, if they were asked for.
    pub statistics: Option<Comparison>,
}

/// Who is told of each output tensor that is finished.
pub trait Observer: fmt::Debug + Send + Sync {
    /// All bytes of tensor `tensor` of merge `merge` were handed to the system. Called once for each, on
    /// any thread, in any order.
    fn finished(&self, merge: usize, tensor: usize, digest: TensorDigest) -> Result<()>;
}

/// What is known of the tensors of merges that are made together, as they are finished.
#[derive(Debug)]
pub struct Digests(Vec<Mutex<Vec<Option<TensorDigest>>>>);

impl Digests {
    /// Of so many merges of so many tensors each. Nothing is known yet.
    pub fn new(merges: usize, tensors: usize) -> Self {
        Self((0..merges).map(|_| Mutex::new(vec![None; tensors])).collect())
    }

    /// Of one merge.
    pub fn of_one(known: Vec<Option<TensorDigest>>) -> Self {
        Self(vec![Mutex::new(known)])
    }

    /// Bytes that it takes.
    pub fn bytes(merges: usize, tensors: usize) -> u64 {
        (merges * tensors * size_of::<Option<TensorDigest>>()) as u64
    }

    /// What is known of each tensor of merge `merge`.
    pub fn of(&self, merge: usize) -> MutexGuard<'_, Vec<Option<TensorDigest>>> {
        self.0[merge].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Observer for Digests {
    fn finished(&self, merge: usize, tensor: usize, digest: TensorDigest) -> Result<()> {
        self.of(merge)[tensor] = Some(digest);
        Ok(())
    }
}

/// A subtree whose bytes are known.
#[derive(Clone, Copy, Debug)]
pub(super) struct Node {
    /// Where in the tensor its bytes end.
    end: u64,
    hash: ChainingValue,
    found: Comparison,
}

/// A cell of which some bytes are there.
#[derive(Debug, Default)]
struct OpenCell {
    out: Vec<u8>,
    /// Of the type of the output.
    reference: Option<Vec<u8>>,
    filled: usize,
}

#[derive(Debug, Default)]
struct State {
    /// By where they begin.
    nodes: BTreeMap<u64, Node>,
    open: BTreeMap<u64, OpenCell>,
}

/// A tensor whose bytes arrive in pieces.
#[derive(Debug)]
pub struct Digester {
    dtype: DType,
    elements: u64,
    /// Whether elements are counted and compared, too.
    compares: bool,
    state: Mutex<State>,
}

impl Digester {
    /// Of a tensor of so many elements, none of which is there.
    pub fn new(dtype: DType, elements: u64) -> Self {
        Self { dtype, elements, compares: dtype.is_float(), state: Mutex::default() }
    }

    /// The same, which only hashes: there are no statistics.
    pub(super) fn of_bytes(dtype: DType, elements: u64) -> Self {
        Self { compares: false, ..Self::new(dtype, elements) }
    }

    /// Takes `out`, the elements from `first` on, each element once. `reference` has as many of what
    /// they are compared with; either all pieces have one or none has.
    pub fn take(&self, level: Level, first: u64, out: &[u8], reference: Option<(DType, &[u8])>) {
        let size = self.dtype.size();
        let end = first + (out.len() / size) as u64;
        let mut at = first;
        while at < end {
            let node = self.node_end(at, end);
            let next = node.unwrap_or_else(|| cell_end(at).min(end));
            let part = |size: usize| (at - first) as usize * size..(next - first) as usize * size;
            let out = &out[part(size)];
            let reference = reference.map(|(dtype, bytes)| (dtype, &bytes[part(dtype.size())]));
            if node.is_some() {
                self.add(at, self.node(level, at..next, out, reference));
            } else {
                self.fill(level, at..next, out, reference);
            }
            at = next;
        }
    }

    /// The end of the largest node that begins at `at` and ends by `end`, if there is one.
    fn node_end(&self, at: u64, end: u64) -> Option<u64> {
        let sizes = std::iter::successors(Some(AT_ONCE), |size| Some(size / 2));
        let mut ends = sizes.take_while(|&size| size >= CELL_ELEMENTS);
        ends.find_map(|size| {
            let next = (at + size).min(self.elements);
            (at.is_multiple_of(size) && next <= end).then_some(next)
        })
    }

    /// Hashes and compares the elements of a node, which may be [`AT_ONCE`] from a multiple of it on, or
    /// the last ones from there.
    pub(super) fn node(
        &self,
        level: Level,
        elements: Range<u64>,
        out: &[u8],
        reference: Option<(DType, &[u8])>,
    ) -> Node {
        let size = self.dtype.size();
        let mut hasher = Hasher::new();
        hasher.set_input_offset(elements.start * size as u64).update(out);
        let hash = if elements == (0..self.elements) {
            hasher.finalize().into()
        } else {
            hasher.finalize_non_root()
        };
        let mut found = Comparison::default();
        if self.compares {
            let mut rounded = Vec::new();
            let parts = steps(0..elements.end - elements.start, COMPARED).map(|part| {
                let part = |size: usize| part.start as usize * size..part.end as usize * size;
                let reference = reference.map(|(dtype, bytes)| {
                    round(level, dtype, &bytes[part(dtype.size())], self.dtype, &mut rounded)
                });
                kernels::compare(level, self.dtype, &out[part(size)], reference)
            });
            found = Comparison::fold(&mut parts.collect::<Vec<_>>());
        }
        Node { end: elements.end * size as u64, hash, found }
    }

    /// Takes the elements of a node that begins at element `first`: puts it beside its neighbours, and
    /// joins them.
    pub(super) fn add(&self, first: u64, mut node: Node) {
        let bytes = self.elements * self.dtype.size() as u64;
        let mut start = first * self.dtype.size() as u64;
        let nodes = &mut self.lock().nodes;
        loop {
            let before = nodes.range(..start).next_back().map(|(&start, &left)| (start, left));
            if let Some((begin, left)) = before
                && left.end == start
                && is_subtree(begin..node.end, start, bytes)
            {
                nodes.remove(&begin);
                (start, node) = (begin, joined(begin, left, node, bytes));
            } else if let Some(&right) = nodes.get(&node.end)
                && is_subtree(start..right.end, node.end, bytes)
            {
                nodes.remove(&node.end);
                node = joined(start, node, right, bytes);
            } else {
                break;
            }
        }
        nodes.insert(start, node);
    }

    /// Puts elements of one cell beside those that are there.
    fn fill(
        &self,
        level: Level,
        elements: Range<u64>,
        out: &[u8],
        reference: Option<(DType, &[u8])>,
    ) {
        let size = self.dtype.size();
        let first = elements.start / CELL_ELEMENTS * CELL_ELEMENTS;
        let cell = first..(first + CELL_ELEMENTS).min(self.elements);
        let whole = (cell.end - cell.start) as usize * size;
        let part = (elements.start - first) as usize * size..(elements.end - first) as usize * size;
        let mut rounded = Vec::new();
        let reference = reference.filter(|_| self.compares);
        let reference =
            reference.map(|(dtype, bytes)| round(level, dtype, bytes, self.dtype, &mut rounded));
        let mut state = self.lock();
        let known = state.open.entry(first).or_default();
        known.out.resize(whole, 0);
        known.out[part.clone()].copy_from_slice(out);
        if let Some(bytes) = reference {
            let known = known.reference.get_or_insert_default();
            known.resize(whole, 0);
            known[part].copy_from_slice(bytes);
        }
        known.filled += out.len();
        let is_whole = known.filled == whole;
        let known = is_whole.then(|| state.open.remove(&first)).flatten();
        drop(state);
        if let Some(OpenCell { out, reference, .. }) = known {
            let reference = reference.as_deref().map(|bytes| (self.dtype, bytes));
            self.add(first, self.node(level, cell, &out, reference));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A thread that died while it held the lock left bytes out, which `finish` finds.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of the tensor, all of whose elements were taken.
    pub fn finish(&self) -> Result<TensorDigest> {
        if self.elements == 0 {
            let (hash, found) = (blake3::hash(b"").into(), Comparison::default());
            return Ok(self.digest(hash, found));
        }
        let bytes = self.elements * self.dtype.size() as u64;
        match self.lock().nodes.first_key_value() {
            Some((0, Node { end, hash, found })) if *end == bytes => Ok(self.digest(*hash, *found)),
            _ => Err(Error::internal("a tensor's bytes were not each hashed once")),
        }
    }

    fn digest(&self, blake3: [u8; 32], found: Comparison) -> TensorDigest {
        TensorDigest { blake3, statistics: self.compares.then_some(found) }
    }
}

fn cell_end(at: u64) -> u64 {
    (at / CELL_ELEMENTS + 1) * CELL_ELEMENTS
}

/// Whether `range` of a tensor of so many bytes is a subtree whose halves meet at `middle`.
fn is_subtree(range: Range<u64>, middle: u64, bytes: u64) -> bool {
    let length = range.end - range.start;
    let fits = max_subtree_len(range.start).is_none_or(|most| length <= most);
    let is_full = range.end == bytes || length.is_power_of_two();
    fits && is_full && middle - range.start == left_subtree_len(length)
}

/// Two halves of a subtree of a tensor of so many bytes; all of it has a hash of its own kind.
fn joined(start: u64, left: Node, right: Node, bytes: u64) -> Node {
    let hash = if start == 0 && right.end == bytes {
        merge_subtrees_root(&left.hash, &right.hash, Mode::Hash).into()
    } else {
        merge_subtrees_non_root(&left.hash, &right.hash, Mode::Hash)
    };
    Node { end: right.end, hash, found: left.found.and(right.found) }
}

/// Elements as another type has them; as they are, if it is the same.
fn round<'a>(
    level: Level,
    from: DType,
    bytes: &'a [u8],
    to: DType,
    rounded: &'a mut Vec<u8>,
) -> &'a [u8] {
    fn go<T: kernels::Real>(level: Level, from: DType, bytes: &[u8], to: DType, out: &mut [u8]) {
        let mut wide = vec![T::ZERO; bytes.len() / from.size()];
        kernels::widen(level, from, bytes, &mut wide);
        kernels::narrow(level, &wide, to, out);
    }
    if from == to {
        return bytes;
    }
    rounded.resize(bytes.len() / from.size() * to.size(), 0);
    if from == DType::F64 {
        go::<f64>(level, from, bytes, to, rounded);
    } else {
        go::<f32>(level, from, bytes, to, rounded);
    }
    rounded
}
