//! A plan while it is made.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use super::{
    Adapted, ByteRange, Formula, Gathered, Kind, Names, Node, Part, Plan, Row, RowMap, Settings,
    Tensor,
};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// A plan that grows, and what finds equal parts of it.
#[derive(Debug, Default)]
pub struct Builder {
    plan: Plan,
    shapes: HashMap<Vec<u64>, u32>,
    kinds: HashMap<Kind, u32>,
    /// Which names are those of output tensors.
    taken: Vec<bool>,
}

/// An input of a tensor to be.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// Index into [`Plan::models`].
    pub model: usize,
    /// Its name there.
    pub name: &'a str,
    /// Its element type.
    pub dtype: DType,
    /// Index into [`Plan::files`].
    pub file: usize,
    /// First byte in that file.
    pub start: u64,
    /// What an adapter makes of it; see [`Builder::add_adapted`].
    pub adapted: Option<u32>,
    /// Rows that are taken instead of those there.
    pub rows: Option<ByToken<'a>>,
}

/// Rows of an input to be.
#[derive(Clone, Copy, Debug)]
pub struct ByToken<'a> {
    /// The number of their map; see [`Builder::add_map`].
    pub map: u32,
    /// What they are taken from.
    pub parts: &'a [Part],
    /// Which part is the model's own.
    pub own: usize,
}

impl Builder {
    /// Goes on with `plan`, which has no tensors yet.
    pub fn new(plan: Plan) -> Self {
        Self { plan, ..Self::default() }
    }

    /// Whether no output tensor was called `name` before.
    pub fn take_name(&mut self, name: &str) -> bool {
        let number = self.plan.names.intern(name).0 as usize;
        if self.taken.len() <= number {
            self.taken.resize(number + 1, false);
        }
        !std::mem::replace(&mut self.taken[number], true)
    }

    /// Adds settings that no others equal; their number.
    pub fn add_settings(&mut self, settings: Settings) -> u32 {
        self.plan.settings.push(settings);
        self.plan.settings.len() as u32 - 1
    }

    /// The settings of that number, if there are any.
    pub fn settings(&self, number: u32) -> Option<&Settings> {
        self.plan.settings.get(number as usize)
    }

    /// Adds a map of rows; its number.
    pub fn add_map(&mut self, map: RowMap) -> u32 {
        self.plan.maps.push(Arc::new(map));
        self.plan.maps.len() as u32 - 1
    }

    /// Adds what an adapter makes of a tensor; its number.
    pub fn add_adapted(&mut self, adapted: Adapted) -> u32 {
        self.plan.adapted.push(Arc::new(adapted));
        self.plan.adapted.len() as u32 - 1
    }

    /// The map of that number, if there is one.
    pub fn map(&self, number: u32) -> Option<&RowMap> {
        self.plan.maps.get(number as usize).map(|map| &**map)
    }

    /// Adds an output tensor, whose place is not yet known.
    pub fn push<'a>(
        &mut self,
        name: &str,
        dtype: DType,
        shape: &[u64],
        settings: u32,
        base: Option<usize>,
        inputs: impl Iterator<Item = Input<'a>>,
    ) {
        let shape = self.shape(shape);
        let first = self.plan.inputs.len() as u32;
        let mut types = Vec::new();
        for input in inputs {
            types.push(input.dtype);
            let (model, name) = (input.model as u32, self.plan.names.intern(input.name).0);
            let node = match input.rows {
                None => Node::Bytes(ByteRange {
                    model,
                    name,
                    file: input.file as u32,
                    shape,
                    dtype: input.dtype,
                    start: input.start,
                    adapted: input.adapted,
                }),
                Some(ByToken { map, parts, own }) => {
                    let first = self.plan.parts.len() as u32;
                    self.plan.parts.extend_from_slice(parts);
                    Node::Rows(Gathered {
                        model,
                        name,
                        shape,
                        dtype: input.dtype,
                        map,
                        parts: first,
                        count: parts.len() as u32,
                        own: own as u32,
                    })
                }
            };
            self.plan.inputs.push(self.plan.nodes.len() as u32);
            self.plan.nodes.push(node);
        }
        let base = base.map(|base| base as u32);
        let kind = Kind { settings, shape, dtype, base, inputs: types, formula: None };
        let row = Row {
            name: self.plan.names.intern(name).0,
            kind: numbered(&mut self.kinds, &mut self.plan.kinds, kind),
            inputs: first,
            shard: 0,
            start: 0,
        };
        self.plan.rows.push(row);
    }

    fn shape(&mut self, shape: &[u64]) -> u32 {
        match self.shapes.get(shape) {
            Some(&known) => known,
            None => numbered(&mut self.shapes, &mut self.plan.shapes, shape.to_vec()),
        }
    }

    /// The plan so far.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Gives every tensor its place, in the order in which they came.
    pub fn place(mut self, places: &[(usize, u64)]) -> Result<Plan> {
        if places.len() != self.plan.rows.len() {
            return Err(Error::internal("not every tensor has a place"));
        }
        for (row, &(shard, start)) in self.plan.rows.iter_mut().zip(places) {
            (row.shard, row.start) = (shard as u32, start);
        }
        // As headers list them: of those at one place, empty ones first.
        let mut by_place: Vec<u32> = (0..self.plan.rows.len() as u32).collect();
        by_place.sort_by_key(|&row| {
            let tensor = self.plan.tensor(row as usize);
            let element = Reverse(tensor.dtype().size());
            (tensor.shard(), tensor.start(), tensor.bytes(), element)
        });
        self.plan.by_place = by_place;
        self.plan.shrink();
        Ok(self.plan)
    }
}

impl Plan {
    /// The same plan, of which `write` gives the formulas of the float tensors that have one. It is
    /// asked once for those that have the same settings and as many inputs, or for `each` tensor.
    pub fn written<E>(
        mut self,
        each: bool,
        mut write: impl FnMut(Tensor<'_>) -> Result<Option<Formula>, E>,
    ) -> Result<Self, E> {
        let (mut formulas, mut numbers, mut asked) = (Vec::new(), HashMap::new(), HashMap::new());
        let mut number = |formula: Formula| {
            let functions = formula.functions.iter().map(|each| Arc::as_ptr(each).addr());
            let arrays = formula.arrays.iter().map(|each| Arc::as_ptr(&each.call).addr());
            let key = (Arc::clone(&formula.nodes), functions.chain(arrays).collect::<Vec<_>>());
            *numbers.entry(key).or_insert_with(|| {
                formulas.push(formula);
                formulas.len() as u32 - 1
            })
        };
        let mut of_rows = Vec::with_capacity(self.rows.len());
        for tensor in self.tensors() {
            let Kind { settings, base, ref inputs, .. } = *tensor.kind_of();
            let key = (settings, base, inputs.len());
            let found = match asked.get(&key) {
                _ if !tensor.dtype().is_float() => None,
                Some(&known) if !each => known,
                _ => {
                    let formula = write(tensor)?.map(&mut number);
                    asked.insert(key, formula);
                    formula
                }
            };
            of_rows.push(found);
        }
        let (mut numbers, mut kinds) = (HashMap::new(), Vec::new());
        for (row, formula) in self.rows.iter_mut().zip(of_rows) {
            let kind = Kind { formula, ..self.kinds[row.kind as usize].clone() };
            row.kind = numbered(&mut numbers, &mut kinds, kind);
        }
        (self.kinds, self.formulas) = (kinds, formulas);
        Ok(self)
    }

    /// The same plan of the output tensors at `indices` only, which lie where they lay.
    #[must_use]
    pub fn only(&self, indices: &[usize]) -> Self {
        let mut some = self.clone();
        some.rows = indices.iter().map(|&index| self.rows[index]).collect();
        some.by_place = (0..some.rows.len() as u32).collect();
        some.by_place.sort_by_key(|&row| {
            let row = &some.rows[row as usize];
            (row.shard, row.start)
        });
        some
    }

    /// Gives back the room that was kept for more.
    fn shrink(&mut self) {
        let Self { names, nodes, inputs, rows, .. } = self;
        Names::shrink(names);
        nodes.shrink_to_fit();
        inputs.shrink_to_fit();
        rows.shrink_to_fit();
    }
}

/// The number of `value` among the distinct ones in `all`.
fn numbered<T: Clone + Eq + std::hash::Hash>(
    numbers: &mut HashMap<T, u32>,
    all: &mut Vec<T>,
    value: T,
) -> u32 {
    match numbers.entry(value) {
        Entry::Occupied(known) => *known.get(),
        Entry::Vacant(new) => {
            all.push(new.key().clone());
            *new.insert(all.len() as u32 - 1)
        }
    }
}
