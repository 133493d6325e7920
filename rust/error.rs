//! One error type: what went wrong, where, what was expected and found, and what to do.
//!
//! The leaf that notices a problem says what it saw; callers add the file and the tensor with
//! [`Error::file`] and [`Error::tensor`]. The Python layer maps [`ErrorKind`] to an exception
//! class and passes the parts on as attributes, so they are kept apart until someone prints them.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// The result of every fallible function of the crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Bytes of a part of an error, at most.
const LONGEST: usize = 400;

/// What kind of thing went wrong; decides the Python exception class and the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The operating system refused: not found, permission, full disk.
    Io(io::ErrorKind),
    /// A checkpoint is broken: header, index, sizes.
    Checkpoint,
    /// A checkpoint is sound but of a kind that cannot be merged (yet).
    Unsupported,
    /// A plan or its parameters do not make sense.
    Plan,
    /// The memory budget cannot hold the smallest step of the work.
    Memory,
    /// A device that computes failed.
    Device,
    /// An input changed while the run was reading it.
    Changed,
    /// The output cannot be written where it was asked to go.
    Output,
    /// Other parts of a merge have not left in time what this one needs.
    Waiting,
    /// The caller asked to stop.
    Interrupted,
    /// The engine broke a promise of its own: a bug.
    Internal,
}

#[derive(Debug)]
struct Parts {
    kind: ErrorKind,
    message: String,
    file: Option<PathBuf>,
    tensor: Option<String>,
    expected: Option<String>,
    found: Option<String>,
    advice: Option<String>,
    source: Option<io::Error>,
}

/// An error with its parts kept apart. One word wide.
#[derive(Debug)]
pub struct Error(Box<Parts>);

impl Error {
    /// An error of `kind`; `message` is lower case, without a full stop.
    #[cold]
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Parts {
            kind,
            message: shortened(message.into()),
            file: None,
            tensor: None,
            expected: None,
            found: None,
            advice: None,
            source: None,
        }))
    }

    /// A broken checkpoint.
    #[cold]
    pub fn checkpoint(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Checkpoint, message)
    }

    /// A plan that does not make sense.
    #[cold]
    pub fn plan(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Plan, message)
    }

    /// A bug: what only the engine itself could have done wrong.
    #[cold]
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Internal, message)
            .advice("this is a bug in oxmerge: please report it, with the recipe and this message")
    }

    /// An operating system error; `doing` completes "failed to …".
    #[cold]
    pub fn io(doing: &str, source: io::Error) -> Self {
        let mut error = Self::new(ErrorKind::Io(source.kind()), format!("failed to {doing}"));
        error.0.source = Some(source);
        error
    }

    /// Names the file, unless a callee did.
    #[must_use]
    pub fn file(mut self, path: impl AsRef<Path>) -> Self {
        self.0.file.get_or_insert_with(|| path.as_ref().to_owned());
        self
    }

    /// Names the tensor, unless a callee did.
    #[must_use]
    pub fn tensor(mut self, name: impl Into<String>) -> Self {
        self.0.tensor.get_or_insert_with(|| name.into());
        self
    }

    /// What should have been there.
    #[must_use]
    pub fn expected(mut self, expected: impl fmt::Display) -> Self {
        self.0.expected = Some(shortened(expected.to_string()));
        self
    }

    /// What was there.
    #[must_use]
    pub fn found(mut self, found: impl fmt::Display) -> Self {
        self.0.found = Some(shortened(found.to_string()));
        self
    }

    /// What the user can do about it.
    #[must_use]
    pub fn advice(mut self, advice: impl Into<String>) -> Self {
        self.0.advice = Some(advice.into());
        self
    }

    /// What the user can do about a broken checkpoint, unless a callee said.
    #[must_use]
    pub(crate) fn or_else_advice(self, advice: &str) -> Self {
        let is_told = self.0.advice.is_some() || self.0.kind != ErrorKind::Checkpoint;
        if is_told { self } else { self.advice(advice) }
    }

    /// The kind.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The bare message, without place or advice.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The parts, for a caller that shows them apart: file, tensor, expected, found, advice.
    pub fn parts(&self) -> ErrorParts<'_> {
        ErrorParts {
            file: self.0.file.as_deref(),
            tensor: self.0.tensor.as_deref(),
            expected: self.0.expected.as_deref(),
            found: self.0.found.as_deref(),
            advice: self.0.advice.as_deref(),
        }
    }

    /// Everything but the file.
    pub fn without_file(&self) -> WithoutFile<'_> {
        WithoutFile(self)
    }

    /// The operating system's error number, if there is one.
    pub fn raw_os_error(&self) -> Option<i32> {
        self.0.source.as_ref().and_then(io::Error::raw_os_error)
    }
}

/// The optional parts of an [`Error`].
#[derive(Clone, Copy, Debug)]
pub struct ErrorParts<'a> {
    /// The file it happened in.
    pub file: Option<&'a Path>,
    /// The tensor it happened to.
    pub tensor: Option<&'a str>,
    /// What should have been there.
    pub expected: Option<&'a str>,
    /// What was there.
    pub found: Option<&'a str>,
    /// What to do.
    pub advice: Option<&'a str>,
}

/// What an [`Error`] says but for the file, for a caller that shows that apart.
#[derive(Clone, Copy, Debug)]
pub struct WithoutFile<'a>(&'a Error);

impl fmt::Display for WithoutFile<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = &*self.0.0;
        if let Some(tensor) = &parts.tensor {
            write!(f, "tensor `{tensor}`: ")?;
        }
        f.write_str(&parts.message)?;
        if let Some(source) = &parts.source {
            write!(f, ": {source}")?;
        }
        match (&parts.expected, &parts.found) {
            (Some(expected), Some(found)) => write!(f, ": expected {expected}, found {found}")?,
            (Some(expected), None) => write!(f, ": expected {expected}")?,
            (None, Some(found)) => write!(f, ": found {found}")?,
            (None, None) => {}
        }
        if let Some(advice) = &parts.advice {
            write!(f, "; {advice}")?;
        }
        Ok(())
    }
}

/// A text whose middle is left out where it is long: what a stranger's file says may be of any length.
fn shortened(text: String) -> String {
    let boundary = |at: &usize| text.is_char_boundary(*at);
    if text.len() <= LONGEST {
        return text;
    }
    let start = (0..=LONGEST / 2).rev().find(boundary).unwrap_or(0);
    let end = (text.len() - LONGEST / 2..=text.len()).find(boundary).unwrap_or(text.len());
    format!("{}...{}", &text[..start], &text[end..])
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(file) = &self.0.file {
            write!(f, "`{}`: ", file.display())?;
        }
        self.without_file().fmt(f)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|source| source as _)
    }
}
