//! Which row of each model stands for which token of the output.
//!
//! The output's tokens are held as text, and so matched exactly; of a model only numbers are kept.
//! Where an output row stands for no token, it is matched by its number: a model has it if it has an
//! unused row of that number. So padding and gaps stay what they are, and one rule says what a model
//! is given that lacks a row.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::vocabulary::each_token;
use crate::error::{Error, Result};
use crate::plan::{MOST_ROWS, Names, Origin, RowMap};

/// No row, no token.
const NONE: u32 = u32::MAX;
/// A token that the output lacks.
const FOREIGN: u32 = u32::MAX - 1;

/// What a model that lacks a row is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Filling {
    /// What the models that have the row suggest: the only one's; the base's; else the mean.
    Usual,
    /// The row that a model has for the token.
    Model(usize),
    /// A row of a model, by its number.
    Row(usize, u32),
    /// Zeros.
    Zero,
}

/// The tokens of the output, and the rows that models have for them.
#[derive(Debug)]
pub struct TokenRows {
    tokens: Names,
    output: Vocabulary,
    models: Vec<Vocabulary>,
    base: Option<usize>,
    rows: u64,
    /// The first row that is the mean of those above.
    mean_from: u64,
    /// By output row; and whether it is given to models that have the row, too.
    fillings: BTreeMap<u64, (Filling, bool)>,
}

/// The vocabulary of a model, its tokens by their numbers in the output's.
#[derive(Debug, Default)]
struct Vocabulary {
    /// How many rows there are at the most.
    limit: u64,
    /// By row: its token, and whether it is one that was added, which stands before others.
    token_of: Vec<(u32, bool)>,
    /// By token: its row, and whether it was added.
    row_of: Vec<(u32, bool)>,
}

impl Vocabulary {
    fn take(&mut self, row: u64, is_added: bool, token: u32) -> Result<(), String> {
        if row >= self.limit {
            return Ok(());
        }
        let at = row as usize;
        self.token_of.resize(self.token_of.len().max(at + 1), (NONE, false));
        let (before, was_added) = self.token_of[at];
        if before != NONE && was_added == is_added && before != token {
            return Err(format!("two tokens have the id {row}"));
        }
        if before != NONE && was_added && !is_added {
            return Ok(());
        }
        if let Some(old) = self.row_of.get_mut(before as usize)
            && old.0 == row as u32
        {
            *old = (NONE, false);
        }
        self.token_of[at] = (token, is_added);
        if token != FOREIGN {
            let token = token as usize;
            self.row_of.resize(self.row_of.len().max(token + 1), (NONE, false));
            let (old, was_added) = self.row_of[token];
            if old == NONE || is_added || !was_added {
                self.row_of[token] = (row as u32, is_added);
            }
        }
        Ok(())
    }

    /// The token of a row, if it stands for one.
    fn token(&self, row: u64) -> Option<u32> {
        let token = self.token_of.get(row as usize).map_or(NONE, |(token, _)| *token);
        (token != NONE).then_some(token)
    }

    /// The row of a token, if there is one.
    fn row(&self, token: u32) -> Option<u32> {
        let row = self.row_of.get(token as usize).map_or(NONE, |(row, _)| *row);
        (row != NONE).then_some(row)
    }
}

impl TokenRows {
    /// Reads the tokens of the output, whose ids are below `limit`, and those of models, each with
    /// how many rows it has. A token without a row is as one that is not there.
    pub fn read(
        output: &[PathBuf],
        limit: u64,
        models: &[(Vec<PathBuf>, u64)],
        base: Option<usize>,
    ) -> Result<Self> {
        let mut tokens = Names::default();
        let mut own = Vocabulary { limit: limit.min(MOST_ROWS), ..Vocabulary::default() };
        for file in output {
            each_token(file, &mut |id, is_added, token| {
                if id >= MOST_ROWS {
                    return Err(format!("the id {id} is more than any vocabulary has"));
                }
                own.take(id, is_added, tokens.intern(token).0)
            })?;
        }
        tokens.shrink();
        let mut read = Vec::new();
        for (files, rows) in models {
            let mut model = Vocabulary { limit: (*rows).min(MOST_ROWS), ..Vocabulary::default() };
            for file in files {
                each_token(file, &mut |id, is_added, token| {
                    model.take(id, is_added, tokens.find(token).unwrap_or(FOREIGN))
                })?;
            }
            read.push(model);
        }
        let rows = own.token_of.len() as u64;
        Ok(Self {
            tokens,
            output: own,
            models: read,
            base,
            rows,
            mean_from: u64::MAX,
            fillings: BTreeMap::new(),
        })
    }

    /// How many rows the output has; until [`resize`](Self::resize), as many as its tokens need.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Gives the output `rows` rows. Those behind its tokens are the mean of its tokens' rows if
    /// `with_mean`, else matched by number.
    pub fn resize(&mut self, rows: u64, with_mean: bool) -> Result<()> {
        let needed = self.output.token_of.len() as u64;
        if rows < needed || rows > MOST_ROWS {
            return Err(Error::plan("the output cannot have so many rows for its tokens")
                .expected(format_args!("{needed} to {MOST_ROWS}"))
                .found(rows));
        }
        self.rows = rows;
        self.mean_from = if with_mean { needed } else { u64::MAX };
        Ok(())
    }

    /// The id of a token of the output.
    pub fn find(&self, token: &str) -> Option<u64> {
        let row = self.output.row(self.tokens.find(token)?)?;
        Some(row.into())
    }

    /// Says what models are given that lack row `row` of the output, and whether that is given to
    /// those that have it, too.
    pub fn fill(&mut self, row: u64, filling: Filling, force: bool) {
        self.fillings.insert(row, (filling, force));
    }

    /// How many rows `model` must have for tokens.
    pub fn limit_of(&self, model: usize) -> u64 {
        self.models[model].limit
    }

    /// How many tokens of the output `model` lacks.
    pub fn lacking(&self, model: usize) -> usize {
        let rows = 0..self.output.token_of.len() as u64;
        rows.filter(|&row| self.output.token(row).is_some() && self.row(model, row).is_none())
            .count()
    }

    /// How many tokens of `model` the output lacks.
    pub fn foreign(&self, model: usize) -> usize {
        let tokens = self.models[model].token_of.iter().filter(|(token, _)| *token != NONE);
        tokens.filter(|(token, _)| self.output.row(*token).is_none()).count()
    }

    /// The row that `model` has for row `row` of the output.
    pub fn row(&self, model: usize, row: u64) -> Option<u32> {
        let model = &self.models[model];
        match self.output.token(row) {
            // Of several rows with one token, the one that is in the same place.
            Some(token) if model.token(row) == Some(token) => Some(row as u32),
            Some(token) => model.row(token),
            None => (row < model.limit && model.token(row).is_none()).then_some(row as u32),
        }
    }

    /// The rows of input `column` of an output tensor that is made of `models`.
    pub fn map(&self, models: &[usize], column: usize) -> Result<RowMap> {
        RowMap::of((0..self.rows).map(|row| Ok((1, self.origin(models, column, row)?))))
    }

    fn origin(&self, models: &[usize], column: usize, row: u64) -> Result<Origin> {
        if row >= self.mean_from {
            return Ok(Origin::MeanAbove);
        }
        let usual = (Filling::Usual, false);
        let (filling, force) = self.fillings.get(&row).unwrap_or(&usual);
        let part = |column: usize, first: u32| Origin::Part { part: column as u32, first };
        let has = |column: usize| self.row(models[column], row).map(|first| (column, first));
        if let Some((column, first)) = has(column).filter(|_| !force) {
            return Ok(part(column, first));
        }
        let column_of = |model: usize| models.iter().position(|&each| each == model);
        let lacks = || {
            let token = self.output.token(row).map_or("", |token| self.tokens.get(token));
            Error::plan("a token is to have the row of a model that is not there")
                .found(format_args!("`{token}`"))
        };
        match *filling {
            Filling::Zero => Ok(Origin::Zero),
            Filling::Row(model, first) => {
                column_of(model).map(|column| part(column, first)).ok_or_else(lacks)
            }
            Filling::Model(model) => {
                let found = column_of(model).and_then(has).ok_or_else(lacks)?;
                Ok(part(found.0, found.1))
            }
            Filling::Usual => {
                let base = self.base.and_then(column_of).and_then(has);
                let having: Vec<_> = (0..models.len()).filter_map(has).collect();
                Ok(match (&*having, base) {
                    ([], _) => Origin::Zero,
                    (&[(column, first)], _) | (_, Some((column, first))) => part(column, first),
                    (several, None) => Origin::Mean(
                        several.iter().map(|&(column, first)| (column as u32, first)).collect(),
                    ),
                })
            }
        }
    }
}

/// The tokens of `files` that have these ids.
pub fn tokens_of(files: &[PathBuf], ids: &[u64]) -> Result<BTreeMap<u64, String>> {
    let mut found: BTreeMap<u64, (bool, String)> = BTreeMap::new();
    for file in files {
        each_token(file, &mut |id, is_added, token| {
            let is_better = found.get(&id).is_none_or(|(was_added, _)| is_added || !was_added);
            if ids.contains(&id) && is_better {
                found.insert(id, (is_added, token.to_owned()));
            }
            Ok(())
        })?;
    }
    Ok(found.into_iter().map(|(id, (_, token))| (id, token)).collect())
}

/// The largest id in the vocabulary of `files`; nothing if it has no token.
pub fn largest_id(files: &[PathBuf]) -> Result<Option<u64>> {
    let mut largest = None;
    for file in files {
        each_token(file, &mut |id, _, _| {
            largest = largest.max(Some(id));
            Ok(())
        })?;
    }
    Ok(largest)
}

/// The id of `token` in the vocabulary of `files`.
pub fn find_token(files: &[PathBuf], token: &str) -> Result<Option<u64>> {
    let mut found: Option<(u64, bool)> = None;
    for file in files {
        each_token(file, &mut |id, is_added, text| {
            let is_better = found.is_none_or(|(_, was_added)| is_added || !was_added);
            if text == token && is_better {
                found = Some((id, is_added));
            }
            Ok(())
        })?;
    }
    Ok(found.map(|(id, _)| id))
}
