//! Names of tensors, each kept once: a model with experts has 100,000, and three models share them.

use std::hash::{BuildHasher, RandomState};

use hashbrown::HashTable;

/// Distinct names, numbered in the order in which they came.
#[derive(Clone, Debug, Default)]
pub struct Names {
    /// All of them, one after the other.
    text: String,
    ends: Vec<usize>,
    numbers: HashTable<u32>,
    hasher: RandomState,
}

impl Names {
    /// The number of `name`, and whether it is new.
    pub fn intern(&mut self, name: &str) -> (u32, bool) {
        let hash = self.hasher.hash_one(name);
        let same = |&number: &u32| part(&self.text, &self.ends, number) == name;
        if let Some(&number) = self.numbers.find(hash, same) {
            return (number, false);
        }
        let number = u32::try_from(self.ends.len()).expect("headers are too short for so many");
        self.text.push_str(name);
        self.ends.push(self.text.len());
        let (text, ends, hasher) = (&self.text, &self.ends, &self.hasher);
        self.numbers.insert_unique(hash, number, |&at| hasher.hash_one(part(text, ends, at)));
        (number, true)
    }

    /// The number of `name`, if it is there.
    pub fn find(&self, name: &str) -> Option<u32> {
        let same = |&number: &u32| self.get(number) == name;
        self.numbers.find(self.hasher.hash_one(name), same).copied()
    }

    /// The name of that number.
    pub fn get(&self, number: u32) -> &str {
        part(&self.text, &self.ends, number)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// All of them, by number.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        (0..self.len() as u32).map(|number| self.get(number))
    }

    /// Gives back the room that was kept for more.
    pub fn shrink(&mut self) {
        self.text.shrink_to_fit();
        self.ends.shrink_to_fit();
    }
}

fn part<'a>(text: &'a str, ends: &[usize], number: u32) -> &'a str {
    let at = number as usize;
    let start = at.checked_sub(1).map_or(0, |before| ends[before]);
    &text[start..ends[at]]
}
