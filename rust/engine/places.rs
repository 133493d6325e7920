//! Where a worker's results go, for each output of a task.

use std::ops::Range;
use std::sync::Arc;

use super::control::Control;
use super::source::{Place, Sink};
use super::task::Task;
use crate::error::Result;
use crate::io::AlignedBuffer;

/// Where the bytes of some elements go in each output: into memory of the sink's own, or into a part
/// of a buffer that is then handed to the sink.
pub(crate) struct Places<'a> {
    first: u64,
    own: Vec<Option<Place<'a>>>,
    buffered: Vec<Range<usize>>,
}

impl<'a> Places<'a> {
    /// Makes room for `elements` in `outs`, a buffer for each sink that has no memory of its own.
    pub(crate) fn of(
        task: &'a Task,
        outs: &mut Vec<AlignedBuffer>,
        elements: &Range<u64>,
    ) -> Result<Self> {
        outs.resize_with(task.sinks.len().max(outs.len()), Default::default);
        let place =
            |sink: &'a Arc<dyn Sink>| sink.is_apart().then(|| sink.place(elements)).flatten();
        let own: Vec<_> = task.sinks.iter().map(place).collect();
        let buffered = |(sink, (own, out)): (&Arc<dyn Sink>, (&Option<_>, &mut AlignedBuffer))| {
            let bytes = (elements.end - elements.start) as usize * sink.dtype().size();
            if own.is_some() {
                return Ok(0..bytes);
            }
            let start = sink.buffer_offset(elements.start);
            out.grow(start + bytes)?;
            Ok(start..start + bytes)
        };
        let buffered = task.sinks.iter().zip(own.iter().zip(outs)).map(buffered);
        let buffered = buffered.collect::<Result<_>>()?;
        Ok(Self { first: elements.start, own, buffered })
    }

    pub(crate) fn bytes<'b>(&'b mut self, outs: &'b mut [AlignedBuffer]) -> Vec<&'b mut [u8]> {
        let each = self.own.iter_mut().zip(self.buffered.iter().zip(outs));
        each.map(|(own, (buffered, out))| match own {
            Some(Place(bytes)) => &mut **bytes,
            None => &mut out.as_mut_slice()[buffered.clone()],
        })
        .collect()
    }

    /// Hands what is in buffers to the sinks.
    pub(crate) fn write(
        &self,
        task: &Task,
        outs: &[AlignedBuffer],
        control: &Control,
    ) -> Result<()> {
        let each = self.own.iter().zip(self.buffered.iter().zip(outs));
        for (sink, (own, (buffered, out))) in task.sinks.iter().zip(each) {
            if own.is_none() {
                sink.write(self.first, out, buffered.clone())?;
            }
            control.add_written(buffered.len() as u64);
        }
        Ok(())
    }
}
