//! A part of a plan, where other runs, on other machines perhaps, make the others.
//!
//! A part is some shards of the output. Runs share nothing but files in one folder. What is reduced
//! over the whole model goes over tensors of all parts: each run sweeps its own, leaves what it found
//! for each tensor in a file, waits for the files of the others, and folds the numbers of all tensors
//! in the order of the plan, as one run would.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use super::control::Control;
use super::journal::{read_numbers, write_numbers};
use crate::error::{Error, ErrorKind, Result};
use crate::io::OutputFolder;

/// How often it is looked whether another run has left its numbers.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How many parts a message names.
const SHOWN: usize = 5;

type Numbers = BTreeMap<usize, Vec<f64>>;

/// Which part of a plan a run makes.
#[derive(Debug)]
pub(crate) struct Part {
    makes: Vec<bool>,
    exchange: Exchange,
    /// What an earlier run of this part has found in a sweep that was over.
    swept: Numbers,
}

/// Where the runs leave what they found in sweeps.
#[derive(Debug)]
pub(crate) struct Exchange {
    pub(crate) folder: OutputFolder,
    /// The key that all parts of the plan have.
    pub(crate) key: String,
    /// The name of each part's file.
    pub(crate) names: Vec<String>,
    /// Which of them is this run's.
    pub(crate) own: usize,
    /// How long to wait for the others.
    pub(crate) wait: Duration,
}

impl Part {
    /// The part that makes those of the `shards` that are true, of a plan of so many tensors.
    pub(crate) fn new(makes: Vec<bool>, exchange: Exchange, tensors: usize) -> Result<Self> {
        let swept = exchange.read(exchange.own, tensors)?.unwrap_or_default();
        Ok(Self { makes, exchange, swept })
    }

    /// Whether this part makes shard `at`.
    pub(super) fn makes(&self, at: usize) -> bool {
        self.makes.get(at).copied().unwrap_or(false)
    }

    /// What an earlier run of this part has found.
    pub(super) fn swept(&self) -> &Numbers {
        &self.swept
    }

    /// Leaves what was `found` for the other parts, and waits for what they leave; the numbers of all
    /// tensors, of which there are so many.
    pub(super) fn exchange(
        &self,
        mut found: Numbers,
        tensors: usize,
        control: &Control,
    ) -> Result<Numbers> {
        let Exchange { folder, key, names, own, wait } = &self.exchange;
        if self.swept.is_empty() {
            write_numbers(folder, &names[*own], key, &found)?;
        }
        let started = Instant::now();
        let mut missing: Vec<usize> = (0..names.len()).filter(|at| at != own).collect();
        loop {
            let mut left = Vec::new();
            for at in missing {
                match self.exchange.read(at, tensors)? {
                    Some(numbers) => found.extend(numbers),
                    None => left.push(at),
                }
            }
            missing = left;
            if missing.is_empty() {
                return Ok(found);
            }
            if started.elapsed() >= *wait {
                return Err(not_swept(&missing).file(folder.path_of("")));
            }
            control.begin_tensor(&format!("waiting for the sweeps of {}", list(&missing)));
            control.check()?;
            thread::sleep(LOOK_EVERY);
        }
    }
}

impl Exchange {
    /// What part `at` has found, if its sweep is over.
    fn read(&self, at: usize, tensors: usize) -> Result<Option<Numbers>> {
        read_numbers(&self.folder, &self.names[at], &self.key, tensors)
    }
}

fn not_swept(missing: &[usize]) -> Error {
    let message = "numbers over the whole model are needed, and other parts have not found theirs";
    Error::new(ErrorKind::Waiting, message)
        .expected("the sweeps of all parts")
        .found(format_args!("none of {}", list(missing)))
        .advice("run this part again when those have run: it goes on from here")
}

fn list(parts: &[usize]) -> String {
    let shown: Vec<String> = parts.iter().take(SHOWN).map(|at| (at + 1).to_string()).collect();
    let more = parts.len().saturating_sub(SHOWN);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    let noun = if parts.len() == 1 { "part" } else { "parts" };
    format!("{noun} {}{more}", shown.join(", "))
}
