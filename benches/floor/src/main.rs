//! The floor: the least time in which this machine can read k models and write one.
//!
//! A copy loop with no arithmetic. The k models have shards of the same sizes. The program walks
//! them side by side: each thread takes the next piece, reads it from every model, keeps a copy of
//! the first and writes that copy at the same offset of the output. Every byte of every input is
//! read and every byte of one model is written and flushed: what any merge of these files must do
//! at the very least. It has none of the engine's code, so that it cannot share its mistakes.

mod job;
mod options;

use std::process::ExitCode;

fn main() -> ExitCode {
    match options::Options::parse(std::env::args().skip(1)).and_then(|o| job::run(&o)) {
        Ok(report) => {
            println!("{report}");
            ExitCode::SUCCESS
        }
        Err(message) => {
            eprintln!("floor: {message}\n{}", options::USAGE);
            ExitCode::FAILURE
        }
    }
}
