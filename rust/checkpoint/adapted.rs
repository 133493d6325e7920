//! A checkpoint with adapters on it: the same tensors, some of which are changed while they are read,
//! and some of which are the adapters' own.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Checkpoint, Row, Tensor};
use crate::error::{Error, ErrorKind, Result};
use crate::plan::{Adapted, Factor, Magnitude, Names, Replaced, Term};

/// What adapters make of a checkpoint. Python finds it (`models/adapters.py`); here it is checked
/// against what the files hold.
#[derive(Debug, Default)]
pub struct Changes {
    /// Tensors that are there under a further name: the new one, and the old one.
    pub copied: Vec<(String, String)>,
    /// Tensors that are an adapter's: the name, and which it is.
    pub replaced: Vec<(String, Given)>,
    /// Tensors that are changed.
    pub changed: Vec<(String, Change)>,
}

/// A tensor of an adapter: the number of the adapter, and its name there.
pub type Given = (usize, String);

/// A factor: the tensor, its first element there, and how many lie between lines and between steps of
/// the rank.
pub type GivenFactor = (Given, u64, u64, u64);

/// A product: first row and the one after the last, rank, scale, factors.
pub type GivenTerm = ((u64, u64), u64, f64, GivenFactor, Option<GivenFactor>);

/// What a tensor becomes; see [`Adapted`].
#[derive(Debug)]
pub struct Change {
    /// Elements of a row.
    pub columns: u64,
    /// The products.
    pub terms: Vec<GivenTerm>,
    /// Magnitudes, and whether they are those of rows.
    pub magnitude: Option<(Given, bool)>,
    /// Rows that are put in, in ascending order, with their places there.
    pub replaced: Option<(Given, Vec<(u64, u64)>)>,
}

impl Checkpoint {
    /// The same with what `adapters` make of it.
    pub fn adapted(&self, adapters: &[Arc<Self>], changes: Changes) -> Result<Self> {
        let mut made = self.clone();
        let mut firsts = Vec::new();
        for adapter in adapters {
            firsts.push(made.files.len());
            made.files.extend_from_slice(&adapter.files);
        }
        let given = |(adapter, name): &Given| -> Result<(Tensor<'_>, u32)> {
            let found = adapters.get(*adapter).and_then(|adapter| adapter.get(name));
            let tensor = found.ok_or_else(|| lacks("an adapter", name))?;
            let number = adapters[*adapter].find(name).unwrap_or_default();
            if adapters[*adapter].change_of(number).is_some() {
                let message = "not supported yet: an adapter's tensor that is a view of another";
                return Err(Error::new(ErrorKind::Unsupported, message)
                    .tensor(name)
                    .advice("save the adapter anew, as safetensors"));
            }
            Ok((tensor, (firsts[*adapter] + tensor.file) as u32))
        };
        let place = |of: &Given, first: u64| -> Result<(Tensor<'_>, u32, u64)> {
            let (tensor, file) = given(of)?;
            if first > tensor.elements() {
                return Err(lacks("an adapter's tensor", &of.1));
            }
            Ok((tensor, file, tensor.start + first * tensor.dtype.size() as u64))
        };
        let factor = |(of, first, line, step): &GivenFactor| {
            let (tensor, file, start) = place(of, *first)?;
            Ok(Factor { file, dtype: tensor.dtype, start, line: *line, step: *step })
        };
        for (name, of) in &changes.copied {
            let row = self.find(of).ok_or_else(|| lacks("the model", of))?;
            let put = made.put(name, self.rows[row], self.tensor(row).written);
            made.adapted.extend(self.change_of(row).map(|view| (put, Arc::clone(view))));
        }
        // A tensor stays what it is to the model: an adapter may have it in f32.
        let mut stored = BTreeMap::new();
        for (name, of) in &changes.replaced {
            let (tensor, file) = given(of)?;
            let shape = made.shape_number(tensor.shape.to_vec());
            let dtype = made.get(name).map_or(tensor.dtype, |was| was.dtype);
            let put = made.put(name, Row { dtype, shape, file, start: tensor.start }, tensor.name);
            made.adapted.remove(&put);
            if dtype != tensor.dtype {
                stored.insert(name.clone(), tensor.dtype);
            }
        }
        let mut adapted = std::mem::take(&mut made.adapted);
        for (name, &dtype) in &stored {
            let row = made.find(name).ok_or_else(|| lacks("the model", name))?;
            let columns = made.tensor(row).shape.last().copied().unwrap_or(1);
            let change = Adapted {
                dtype,
                columns,
                terms: Vec::new(),
                magnitude: None,
                replaced: None,
                strides: None,
            };
            adapted.insert(row as u32, Arc::new(change));
        }
        for (name, change) in changes.changed {
            let row = made.find(&name).ok_or_else(|| lacks("the model", &name))?;
            let tensor = made.tensor(row);
            let term = |((start, end), rank, scale, left, right): &GivenTerm| -> Result<Term> {
                let (left, right) = (factor(left)?, right.as_ref().map(factor).transpose()?);
                Ok(Term { rows: *start..*end, rank: *rank, scale: *scale, left, right })
            };
            let magnitude = |(of, of_rows): &(Given, bool)| -> Result<Magnitude> {
                let (tensor, file, start) = place(of, 0)?;
                Ok(Magnitude { file, dtype: tensor.dtype, start, of_rows: *of_rows })
            };
            let replaced = |(of, rows): &(Given, Vec<(u64, u64)>)| -> Result<Replaced> {
                let (tensor, file, start) = place(of, 0)?;
                Ok(Replaced { rows: rows.clone(), file, dtype: tensor.dtype, start })
            };
            let change = Adapted {
                dtype: stored.get(&name).copied().unwrap_or(tensor.dtype),
                columns: change.columns,
                terms: change.terms.iter().map(term).collect::<Result<_>>()?,
                magnitude: change.magnitude.as_ref().map(magnitude).transpose()?,
                replaced: change.replaced.as_ref().map(replaced).transpose()?,
                strides: adapted.get(&(row as u32)).and_then(|view| view.strides.clone()),
            };
            let checked = change.check(tensor.elements(), &made.files);
            checked.map_err(|error| error.tensor(&name))?;
            adapted.insert(row as u32, Arc::new(change));
        }
        made.adapted = adapted;
        Ok(made)
    }

    /// What an adapter makes of tensor `index`.
    pub fn change_of(&self, index: usize) -> Option<&Arc<Adapted>> {
        self.adapted.get(&(index as u32))
    }

    /// Gives the name a tensor, instead of the one it had or as one more; its number.
    fn put(&mut self, name: &str, row: Row, written: &str) -> u32 {
        let (number, is_new) = self.names.intern(name);
        if is_new {
            self.rows.push(row);
        } else {
            self.rows[number as usize] = row;
        }
        if let (true, Some(known)) = (is_new, &mut self.written) {
            // A name in a file of its own: it need not be the only one that is written so.
            let mut names = Names::clone(known);
            let mut alone = written.to_owned();
            while !names.intern(&alone).1 {
                alone.push('\'');
            }
            *known = Arc::new(names);
        }
        number
    }
}

#[cold]
fn lacks(what: &str, name: &str) -> Error {
    Error::plan(format!("{what} lacks a tensor")).tensor(name)
}
