//! From registers and a copy of the stack to addresses, one frame after the other.
//!
//! A frame pointer is believed only after tables have led out of the function that made the syscall: libc has
//! none, and following the caller's would skip the caller.

use super::{Modules, cfi::Step, golang};
use crate::symbolise::{
    How, RawStack,
    protocol::{Content, MAX_FRAMES, Mapping, Walk},
};

/// The instruction that a first frame stands behind.
const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// Bytes of code that are asked for behind a return address in compiled code.
const EPILOGUE: usize = 16;

/// What is known of the registers of one frame.
#[derive(Clone, Copy, Debug)]
pub(super) struct Registers {
    pub(super) ip: u64,
    pub(super) sp: u64,
    /// Unknown behind code that says nothing of it.
    pub(super) bp: Option<u64>,
    /// `ip` is the interrupted instruction, not the one behind a call.
    pub(super) exact: bool,
}

/// A copy of memory.
pub(super) struct Stack<'a> {
    pub(super) from: u64,
    pub(super) bytes: &'a [u8],
}

impl Stack<'_> {
    pub(super) fn word(&self, address: u64) -> Option<u64> {
        let start = usize::try_from(address.checked_sub(self.from)?).ok()?;
        Some(u64::from_le_bytes(*self.bytes.get(start..)?.first_chunk()?))
    }
}

/// Where a step leads.
enum Next {
    To(Registers, How),
    End,
    Stop,
}

pub(super) struct Walker<'a> {
    pub(super) mappings: &'a [Mapping],
    pub(super) modules: &'a mut Modules,
}

impl Walker<'_> {
    pub(super) fn walk(&mut self, raw: &RawStack) -> Walk {
        let stack = Stack { from: raw.sp, bytes: &raw.stack };
        let mut registers = Registers { ip: raw.ip, sp: raw.sp, bp: Some(raw.bp), exact: false };
        let mut how = How::Registers;
        let mut walk = Walk::default();
        // Tables have led out of a function: from then on frame pointers may be believed.
        let mut by_tables = false;
        while walk.frames.len() < MAX_FRAMES {
            // A call or syscall instruction ends just before the address, and may be the last of its function.
            let address = registers.ip.wrapping_sub(u64::from(!registers.exact));
            let Some(mapping) = self.mapping(address) else {
                walk.lost = true;
                if how == How::Registers {
                    walk.frames.push((address, how));
                }
                break;
            };
            walk.frames.push((address, how));
            let next = match mapping.content {
                Content::File(module) => {
                    let offset = address - mapping.start + mapping.offset;
                    self.in_file(module, offset, registers, &stack).unwrap_or_else(|code| match how {
                        How::Registers if code.starts_with(&SYSCALL) => self.out_of_leaf(registers, &stack),
                        How::Registers => Next::Stop,
                        _ if by_tables => self.by_frame_pointer(registers, &stack),
                        _ => Next::Stop,
                    })
                }
                Content::Anonymous if by_tables => self.in_memory(registers, &stack),
                Content::Anonymous | Content::Sealed => Next::Stop,
            };
            match next {
                Next::End => {
                    walk.complete = true;
                    break;
                }
                Next::Stop => break,
                Next::To(up, by) => {
                    by_tables |= matches!(by, How::Tables | How::Go);
                    // A stack is walked upwards.
                    if up.sp <= registers.sp {
                        break;
                    }
                    if up.ip == 0 {
                        walk.complete = true;
                        break;
                    }
                    (registers, how) = (up, by);
                }
            }
        }
        walk
    }

    fn mapping(&self, address: u64) -> Option<Mapping> {
        let after = self.mappings.partition_point(|mapping| mapping.start <= address);
        let mapping = self.mappings.get(after.checked_sub(1)?)?;
        (address < mapping.end).then_some(*mapping)
    }

    /// A step by the tables of a file. If they do not cover the address, the last two bytes of the instruction
    /// there.
    fn in_file(
        &mut self,
        id: u32,
        offset: u64,
        registers: Registers,
        stack: &Stack<'_>,
    ) -> Result<Next, &'static [u8]> {
        let Some(module) = self.modules.get(id) else { return Ok(Next::Stop) };
        let Some(place) = module.image.address(offset) else { return Ok(Next::Stop) };
        if let Some(step) = module.go.as_ref().and_then(|go| go.step(place, registers, stack)) {
            return Ok(match step {
                golang::Step::To(up) => Next::To(up, How::Go),
                golang::Step::End => Next::End,
                golang::Step::Stop => Next::Stop,
            });
        }
        match module.cfi.as_mut().map_or(Step::Uncovered, |cfi| cfi.step(place, registers, stack)) {
            Step::To(up) => Ok(Next::To(up, How::Tables)),
            Step::End => Ok(Next::End),
            Step::Stuck => Ok(Next::Stop),
            Step::Uncovered => {
                let code = place.checked_sub(1).and_then(|start| module.image.bytes_at(start));
                Err(code.unwrap_or_default())
            }
        }
    }

    /// A syscall stub without tables, such as glibc's clone: the return address is on top of the stack.
    fn out_of_leaf(&mut self, registers: Registers, stack: &Stack<'_>) -> Next {
        match stack.word(registers.sp) {
            Some(ip) if self.is_behind_a_call(ip) => {
                Next::To(Registers { ip, sp: registers.sp + 8, exact: false, ..registers }, How::Leaf)
            }
            _ => Next::Stop,
        }
    }

    fn by_frame_pointer(&mut self, registers: Registers, stack: &Stack<'_>) -> Next {
        let Some(bp) = registers.bp.filter(|bp| *bp >= registers.sp && bp % 8 == 0) else {
            return Next::Stop;
        };
        let (Some(saved), Some(ip)) = (stack.word(bp), bp.checked_add(8).and_then(|at| stack.word(at)))
        else {
            return Next::Stop;
        };
        if !self.is_behind_a_call(ip) {
            return Next::Stop;
        }
        Next::To(
            Registers { ip, sp: bp.saturating_add(16), bp: Some(saved), exact: false },
            How::FramePointer,
        )
    }

    /// Code that the process compiled. What follows the call gives the frame back, if it does so at once.
    fn in_memory(&mut self, registers: Registers, stack: &Stack<'_>) -> Next {
        let code = self.modules.code(registers.ip);
        let code = code.get(..EPILOGUE.min(code.len())).unwrap_or_default();
        if let Some((size, saves_bp)) = epilogue(code) {
            let Some(at) = registers.sp.checked_add(size) else { return Next::Stop };
            let bp = if saves_bp { at.checked_sub(8).and_then(|at| stack.word(at)) } else { registers.bp };
            return match stack.word(at) {
                Some(ip) => {
                    Next::To(Registers { ip, sp: at.saturating_add(8), bp, exact: false }, How::Epilogue)
                }
                None => Next::Stop,
            };
        }
        self.by_frame_pointer(registers, stack)
    }

    fn is_behind_a_call(&mut self, ip: u64) -> bool {
        let Some(mapping) = ip.checked_sub(1).and_then(|address| self.mapping(address)) else { return false };
        match mapping.content {
            Content::Anonymous => true,
            Content::Sealed => false,
            Content::File(id) => {
                let Some(module) = self.modules.get(id) else { return false };
                let end = usize::try_from(ip - mapping.start + mapping.offset).ok();
                end.and_then(|end| module.image.data.get(end.checked_sub(7)?..end)).is_some_and(ends_in_call)
            }
        }
    }
}

/// Whether a call instruction ends with these seven bytes.
fn ends_in_call(bytes: &[u8]) -> bool {
    // `call rel32`, or `call r/m64` (ff /2) of two to seven bytes, a prefix before it left out.
    let indirect = |back: usize| {
        let start = bytes.len().checked_sub(back);
        let Some([0xff, modrm, ..]) = start.and_then(|start| bytes.get(start..)) else { return false };
        let (mode, rm) = (modrm >> 6, modrm & 7);
        let sib = usize::from(mode != 3 && rm == 4);
        let displacement = match (mode, rm) {
            (0, 5) | (2, _) => 4,
            (1, _) => 1,
            _ => 0,
        };
        // With a SIB byte whose base is 5 and mode 0 there is a displacement of four bytes.
        let lengths = [2 + sib + displacement, 2 + sib + 4];
        (modrm >> 3) & 7 == 2 && lengths[..1 + usize::from(mode == 0 && sib == 1)].contains(&back)
    };
    bytes.len() >= 5 && bytes[bytes.len() - 5] == 0xe8 || (2..=7).any(indirect)
}

/// Bytes that a function gives back before it returns, and whether a saved frame pointer is the last of them.
fn epilogue(code: &[u8]) -> Option<(u64, bool)> {
    match code {
        [0xc3, ..] => Some((0, false)),
        [0x5d, 0xc3, ..] => Some((8, true)),
        [0x48, 0x83, 0xc4, size, 0xc3, ..] if *size < 0x80 => Some((u64::from(*size), false)),
        [0x48, 0x83, 0xc4, size, 0x5d, 0xc3, ..] if *size < 0x80 => Some((u64::from(*size) + 8, true)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_recognised_by_their_end() {
        let calls: [&[u8]; 7] = [
            &[0x90, 0x90, 0xe8, 1, 2, 3, 4],
            &[0x90, 0x90, 0x90, 0x90, 0x90, 0xff, 0xd0],
            &[0x90, 0x90, 0x90, 0x90, 0xff, 0x50, 0x18],
            &[0x90, 0xff, 0x15, 1, 2, 3, 4],
            &[0x90, 0x90, 0x90, 0x90, 0xff, 0x14, 0xc8],
            &[0xff, 0x14, 0xc5, 1, 2, 3, 4],
            &[0x90, 0xff, 0x92, 1, 2, 3, 4],
        ];
        for call in calls {
            assert!(ends_in_call(call), "{call:x?}");
        }
        assert!(!ends_in_call(&[0x90; 7]));
        // `jmp *%rax`, `push`.
        assert!(!ends_in_call(&[0x90, 0x90, 0x90, 0x90, 0x90, 0xff, 0xe0]));
        assert!(!ends_in_call(&[]));
    }

    #[test]
    fn what_a_function_gives_back_is_read_from_its_end() {
        assert_eq!(epilogue(&[0x48, 0x83, 0xc4, 0x08, 0xc3]), Some((8, false)));
        assert_eq!(epilogue(&[0x5d, 0xc3, 0x90]), Some((8, true)));
        assert_eq!(epilogue(&[0x48, 0x83, 0xc4, 0x10, 0x5d, 0xc3]), Some((0x18, true)));
        assert_eq!(epilogue(&[0x48, 0x8b, 0x45]), None);
        assert_eq!(epilogue(&[]), None);
    }
}
