//! The command line.

use std::path::PathBuf;

pub const USAGE: &str = "usage: floor [--threads N] [--piece BYTES] [--read mmap|pread|direct] \
[--write direct|buffered] OUT MODEL [MODEL ...]
Reads every *.safetensors file of the MODEL directories; writes as much as one of them to OUT.";

/// How the inputs are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Read {
    /// Mapped, a piece at a time populated and dropped behind.
    Mmap,
    /// Copied out of the page cache by `pread`.
    Pread,
    /// `pread` past the page cache: of use when the inputs are cold.
    Direct,
}

/// How the output is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// `O_DIRECT`, into reserved space.
    Direct,
    /// Through the page cache.
    Buffered,
}

/// What to run.
#[derive(Debug)]
pub struct Options {
    pub threads: usize,
    /// Bytes of each model in one piece of work: a multiple of 4096.
    pub piece: usize,
    pub read: Read,
    pub write: Write,
    pub out: PathBuf,
    pub models: Vec<PathBuf>,
}

impl Options {
    /// Parses the arguments after the program's name.
    pub fn parse(args: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut args = args;
        let mut paths = Vec::new();
        let (mut threads, mut piece) = (4, 8 << 20);
        let (mut read, mut write) = (Read::Mmap, Write::Direct);
        while let Some(arg) = args.next() {
            if !arg.starts_with("--") {
                paths.push(PathBuf::from(arg));
                continue;
            }
            let value = args.next().ok_or_else(|| format!("{arg} needs a value"))?;
            match (arg.as_str(), value.as_str()) {
                ("--threads", n) => threads = number(n)?,
                ("--piece", n) => piece = number(n)?,
                ("--read", "mmap") => read = Read::Mmap,
                ("--read", "pread") => read = Read::Pread,
                ("--read", "direct") => read = Read::Direct,
                ("--write", "direct") => write = Write::Direct,
                ("--write", "buffered") => write = Write::Buffered,
                _ => return Err(format!("unknown option: {arg} {value}")),
            }
        }
        if piece % 4096 != 0 {
            return Err("--piece must be a multiple of 4096".into());
        }
        if paths.len() < 2 {
            return Err("an output directory and at least one model are needed".into());
        }
        let models = paths.split_off(1);
        Ok(Self { threads, piece, read, write, out: paths.remove(0), models })
    }
}

fn number(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| format!("not a positive number: {text}"))
}
