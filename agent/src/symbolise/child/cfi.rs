//! One step up the stack by call frame information (`.eh_frame`).
//!
//! An unwinder of its own over gimli, because a step has to say how it was made: ready ones fall back to the
//! frame pointer in silence where the tables fail, and that loses the caller of libc.

use gimli::{
    BaseAddresses, CfaRule, CieOrFde, EhFrame, EhFrameHdr, EhFrameOffset, Encoding, EndianSlice,
    EvaluationResult, Expression, FrameDescriptionEntry, LittleEndian, Location, ParsedEhFrameHdr, Register,
    RegisterRule, UnwindContext, UnwindSection, Value, X86_64,
};
use object::{elf::PT_GNU_EH_FRAME, read::elf::ProgramHeader};

use super::{
    image::{Image, LE},
    walk::{Registers, Stack},
};

type Slice = EndianSlice<'static, LittleEndian>;
type Fde = FrameDescriptionEntry<Slice>;

/// Instructions of one entry that are run, in bytes: the longest honest function has some thousands.
const MAX_ENTRY: usize = 1 << 20;
/// An honest expression has a handful of operations.
const MAX_OPERATIONS: u32 = 1000;

/// The tables of one file.
pub(super) struct Cfi {
    frames: EhFrame<Slice>,
    bases: BaseAddresses,
    index: Index,
    context: UnwindContext<usize>,
}

enum Index {
    /// Made by the linker.
    Header(Box<ParsedEhFrameHdr<Slice>>),
    /// Made here: first addresses, sorted, with the place of the entry.
    Sorted(Vec<(u64, usize)>),
}

/// What the tables say of an address.
pub(super) enum Step {
    To(Registers),
    /// This is the outermost function.
    End,
    /// They cover the address, but what they want is not known.
    Stuck,
    /// They do not cover it.
    Uncovered,
}

impl Cfi {
    /// `room` is how many entries may still be indexed for files that have no index.
    pub(super) fn of(image: &Image, room: &mut usize) -> Option<Self> {
        Self::with_header(image).or_else(|| Self::without_header(image, room))
    }

    fn with_header(image: &Image) -> Option<Self> {
        let segment = image.segments.iter().find(|segment| segment.p_type(LE) == PT_GNU_EH_FRAME)?;
        let at = segment.p_vaddr(LE);
        let bases = BaseAddresses::default().set_eh_frame_hdr(at);
        let header = EhFrameHdr::new(image.bytes_at(at)?, LittleEndian).parse(&bases, 8).ok()?;
        header.table()?;
        let frames_at = header.eh_frame_ptr().direct().ok()?;
        let mut frames = EhFrame::new(image.bytes_at(frames_at)?, LittleEndian);
        frames.set_address_size(8);
        let index = Index::Header(Box::new(header));
        Some(Self { frames, bases: bases.set_eh_frame(frames_at), index, context: UnwindContext::new() })
    }

    fn without_header(image: &Image, room: &mut usize) -> Option<Self> {
        let (bytes, at) = image.section(b".eh_frame")?;
        let mut frames = EhFrame::new(bytes, LittleEndian);
        frames.set_address_size(8);
        let bases = BaseAddresses::default().set_eh_frame(at);
        let mut sorted = Vec::new();
        let mut entries = frames.entries(&bases);
        while let Ok(Some(entry)) = entries.next() {
            if let CieOrFde::Fde(partial) = entry
                && let Ok(fde) = partial.parse(EhFrame::cie_from_offset)
            {
                *room = room.checked_sub(1)?;
                sorted.push((fde.initial_address(), fde.offset()));
            }
        }
        sorted.sort_unstable();
        Some(Self { frames, bases, index: Index::Sorted(sorted), context: UnwindContext::new() })
    }

    fn entry(&self, address: u64) -> Option<Fde> {
        let offset = match &self.index {
            Index::Header(header) => {
                let table = header.table()?;
                let at = table.lookup(address, &self.bases).ok()?;
                table.pointer_to_offset(at).ok()?
            }
            Index::Sorted(sorted) => {
                let after = sorted.partition_point(|(first, _)| *first <= address);
                EhFrameOffset(sorted.get(after.checked_sub(1)?)?.1)
            }
        };
        let fde = self.frames.fde_from_offset(&self.bases, offset, EhFrame::cie_from_offset).ok()?;
        (fde.contains(address) && fde.entry_len() <= MAX_ENTRY).then_some(fde)
    }

    /// The registers of the caller. `address` is the one to look up, in the terms of the file.
    pub(super) fn step(&mut self, address: u64, registers: Registers, stack: &Stack<'_>) -> Step {
        let Some(fde) = self.entry(address) else { return Step::Uncovered };
        let encoding = fde.cie().encoding();
        let row = fde.unwind_info_for_address(&self.frames, &self.bases, &mut self.context, address);
        let Ok(row) = row else { return Step::Stuck };
        let machine = Machine { frames: &self.frames, encoding, registers, stack };
        let cfa = match row.cfa() {
            CfaRule::RegisterAndOffset { register, offset } => {
                registers.get(*register).map(|value| value.wrapping_add_signed(*offset))
            }
            CfaRule::Expression(expression) => {
                expression.get(&self.frames).ok().and_then(|expression| machine.evaluate(expression, None))
            }
        };
        let Some(cfa) = cfa else { return Step::Stuck };
        let ip = match row.register(X86_64::RA) {
            None | Some(RegisterRule::Undefined) => return Step::End,
            Some(rule) => machine.recover(&rule, cfa, Some(registers.ip)),
        };
        let Some(ip) = ip else { return Step::Stuck };
        let bp = match row.register(X86_64::RBP) {
            None => registers.bp,
            Some(rule) => machine.recover(&rule, cfa, registers.bp),
        };
        Step::To(Registers { ip, sp: cfa, bp, exact: fde.is_signal_trampoline() })
    }
}

/// Evaluates rules.
struct Machine<'a> {
    frames: &'a EhFrame<Slice>,
    encoding: Encoding,
    registers: Registers,
    stack: &'a Stack<'a>,
}

impl Machine<'_> {
    /// The value of a register in the caller; `same` is its value here.
    fn recover(&self, rule: &RegisterRule<usize>, cfa: u64, same: Option<u64>) -> Option<u64> {
        match rule {
            RegisterRule::SameValue => same,
            RegisterRule::Offset(offset) => self.stack.word(cfa.wrapping_add_signed(*offset)),
            RegisterRule::ValOffset(offset) => Some(cfa.wrapping_add_signed(*offset)),
            RegisterRule::Register(register) => self.registers.get(*register),
            RegisterRule::Expression(expression) => {
                let expression = expression.get(self.frames).ok()?;
                self.stack.word(self.evaluate(expression, Some(cfa))?)
            }
            RegisterRule::ValExpression(expression) => {
                self.evaluate(expression.get(self.frames).ok()?, Some(cfa))
            }
            RegisterRule::Constant(value) => Some(*value),
            _ => None,
        }
    }

    fn evaluate(&self, expression: Expression<Slice>, initial: Option<u64>) -> Option<u64> {
        let mut evaluation = expression.evaluation(self.encoding);
        evaluation.set_max_iterations(MAX_OPERATIONS);
        if let Some(initial) = initial {
            evaluation.set_initial_value(initial);
        }
        let mut result = evaluation.evaluate().ok()?;
        loop {
            result = match result {
                EvaluationResult::Complete => break,
                EvaluationResult::RequiresMemory { address, size: 8, space: None, .. } => {
                    evaluation.resume_with_memory(Value::Generic(self.stack.word(address)?)).ok()?
                }
                EvaluationResult::RequiresRegister { register, .. } => {
                    evaluation.resume_with_register(Value::Generic(self.registers.get(register)?)).ok()?
                }
                _ => return None,
            };
        }
        match evaluation.as_result() {
            [piece] => match piece.location {
                Location::Address { address } => Some(address),
                Location::Value { value } => value.to_u64(u64::MAX).ok(),
                _ => None,
            },
            _ => None,
        }
    }
}

impl Registers {
    fn get(self, register: Register) -> Option<u64> {
        match register {
            X86_64::RA => Some(self.ip),
            X86_64::RSP => Some(self.sp),
            X86_64::RBP => self.bp,
            _ => None,
        }
    }
}
