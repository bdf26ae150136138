//! The model: what each operation does to fd tables, threads and processes, which command makes a puppet do
//! it, what the call must answer, and which events it must give. Pure: no process, no clock.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use plumb_common::event::{FD_CLOSE_ON_EXEC, FD_CLOSED, FD_OPENED, FD_REPLACED};

use super::{
    op::{Kind, Op, What},
    protocol::{self, MAIL_IN, MAIL_OUT, MAX_SENT, SLOTS, STAGE, THREADS},
    terms::{
        Expect, Expected, FileId, Held, Process, Reply, Rules, Step, Table, TableId, Task, Thread, Touch,
    },
};

/// Puppets that live at a time.
const PUPPETS: usize = 8;
/// Where an fd table ends for an operation that would add to it.
const MANY_FDS: usize = 150;
/// Less than the kernel lets wait at a datagram socket (net.unix.max_dgram_qlen is 10).
const MANY_MAILS: usize = 6;
/// Closing these would cut the puppet off: stdin, stdout, stderr and the mailbox.
const PROTECTED: u32 = MAIL_OUT + 1;

#[derive(Debug)]
pub(crate) struct World {
    rules: Rules,
    pub(crate) processes: BTreeMap<usize, Process>,
    pub(crate) tables: BTreeMap<TableId, Table>,
    pub(crate) kinds: BTreeMap<FileId, Option<Kind>>,
    mailbox: VecDeque<Vec<FileId>>,
    /// Since the last quiesce.
    pub(crate) ended: Vec<Task>,
    slots_in_use: BTreeSet<usize>,
    pub(crate) expected: Vec<Expected>,
    steps: Vec<Step>,
    next: u32,
}

impl World {
    /// The stage alone, with stdin, stdout and stderr. Its task is 0.
    pub(crate) fn new(rules: Rules) -> Self {
        let mut world = Self {
            rules,
            processes: BTreeMap::new(),
            tables: BTreeMap::new(),
            kinds: BTreeMap::new(),
            mailbox: VecDeque::new(),
            ended: Vec::new(),
            slots_in_use: BTreeSet::from([STAGE]),
            expected: Vec::new(),
            steps: Vec::new(),
            next: 1,
        };
        let files = [0, 1, 2].map(|fd| (fd, Held { file: world.file(None), cloexec: false }));
        let table = world.table(files.into());
        let threads = BTreeMap::from([(0, Thread { task: 0, table, gone: false })]);
        world.processes.insert(STAGE, Process { id: 0, parent: 0, threads, leader: 0, actor: 0 });
        world
    }

    /// The first puppet of a case, with a mailbox.
    pub(crate) fn begin(&mut self) -> Vec<Step> {
        self.mailbox.clear();
        self.fork(STAGE, false);
        let slot = *self.processes.keys().next_back().unwrap_or(&STAGE);
        let command = [protocol::SOCKETPAIR, libc::SOCK_DGRAM as u32];
        self.make_pair(slot, command, libc::SYS_socketpair as u32, [None; 2], false);
        std::mem::take(&mut self.steps)
    }

    /// Everybody ends but the stage.
    pub(crate) fn end(&mut self) -> Vec<Step> {
        for slot in self.puppets() {
            self.exit(slot, 0);
        }
        std::mem::take(&mut self.steps)
    }

    /// After a quiesce: the places of those who ended are free again.
    pub(crate) fn forget_the_dead(&mut self) {
        self.ended.clear();
        self.expected.clear();
        self.slots_in_use = self.processes.keys().copied().collect();
        let held = self.tables.values().flat_map(BTreeMap::values).map(|held| held.file);
        let in_use: BTreeSet<FileId> = held.chain(self.mailbox.iter().flatten().copied()).collect();
        self.kinds.retain(|file, _| in_use.contains(file));
    }

    /// Slots of the puppets that live, without the stage.
    fn puppets(&self) -> Vec<usize> {
        self.processes.keys().copied().filter(|slot| *slot != STAGE).collect()
    }

    /// The process that is the parent by now; orphans are the stage's.
    pub(crate) fn parent(&self, process: &Process) -> Task {
        let lives = self.processes.values().any(|other| other.id == process.parent);
        if lives { process.parent } else { 0 }
    }

    /// What an operation makes the puppets do; empty when it does not apply.
    pub(crate) fn apply(&mut self, op: Op) -> Vec<Step> {
        let puppets = self.puppets();
        let slot = puppets[op.by as usize % puppets.len()];
        self.act(slot, op.what);
        std::mem::take(&mut self.steps)
    }

    fn act(&mut self, slot: usize, what: What) -> Option<()> {
        let table = self.table_of(slot);
        let held = |fd: u32| table.get(&fd).copied();
        let bad = Reply::Is([-libc::EBADF, 0, 0, 0]);
        match what {
            What::Make { kind, cloexec } => self.make(slot, kind, cloexec),
            What::Dup { fd } => {
                let made = held(fd).map(|held| (held.file, lowest(&table, 0)));
                self.install(slot, [libc::SYS_dup as u32, fd, 0, 0], FD_OPENED, made, false)
            }
            What::DupFd { fd, from, cloexec } => {
                let command = if cloexec { libc::F_DUPFD_CLOEXEC } else { libc::F_DUPFD } as u32;
                let made = held(fd).map(|held| (held.file, lowest(&table, from)));
                self.install(slot, [libc::SYS_fcntl as u32, fd, command, from], FD_OPENED, made, cloexec)
            }
            What::Dup2 { fd, to } => {
                free(to)?;
                let call = [libc::SYS_dup2 as u32, fd, to, 0];
                if fd == to {
                    let reply = if held(fd).is_some() { Reply::Is([to as i32, 0, 0, 0]) } else { bad };
                    return self.call(slot, call, reply);
                }
                let made = held(fd).map(|held| (held.file, to));
                self.install(slot, call, FD_REPLACED, made, false)
            }
            What::Dup3 { fd, to, cloexec } => {
                free(to)?;
                let flags = if cloexec { libc::O_CLOEXEC as u32 } else { 0 };
                let call = [libc::SYS_dup3 as u32, fd, to, flags];
                if fd == to {
                    return self.call(slot, call, Reply::Is([-libc::EINVAL, 0, 0, 0]));
                }
                let made = held(fd).map(|held| (held.file, to));
                self.install(slot, call, FD_REPLACED, made, cloexec)
            }
            What::Close { fd } => {
                free(fd)?;
                let call = [libc::SYS_close as u32, fd, 0, 0];
                if held(fd).is_none() {
                    return self.call(slot, call, bad);
                }
                self.remove(slot, call, FD_CLOSED, [fd, fd], |table| table.retain(|held, _| *held != fd))
            }
            What::CloseRange { first, last } => {
                free(first)?;
                let call = [libc::SYS_close_range as u32, first, last, 0];
                self.remove(slot, call, FD_CLOSED, [first, last], |table| {
                    table.retain(|fd, _| !(first..=last).contains(fd));
                })
            }
            What::UnshareRange { first, last } => {
                free(first)?;
                let old = Touch::Table(self.table_id(slot));
                if first <= last {
                    self.unshare(slot);
                }
                let call = [libc::SYS_close_range as u32, first, last, 2];
                self.remove(slot, call, FD_CLOSED, [first, last], |table| {
                    table.retain(|fd, _| !(first..=last).contains(fd));
                });
                self.steps.last_mut()?.touches.push(old);
                Some(())
            }
            What::MarkRange { first, last } => {
                free(first)?;
                let call = [libc::SYS_close_range as u32, first, last, 4];
                if !self.rules.mark_range {
                    return self.call(slot, call, Reply::Is([-libc::EINVAL, 0, 0, 0]));
                }
                self.remove(slot, call, FD_CLOSE_ON_EXEC, [first, last], |table| {
                    table.range_mut(first..=last).for_each(|(_, held)| held.cloexec = true);
                })
            }
            What::SetCloexec { fd, on } => {
                free(fd)?;
                let reply = if held(fd).is_some() { Reply::Is([0; 4]) } else { bad };
                if let Some(held) = self.table_mut(slot).get_mut(&fd) {
                    held.cloexec = on;
                }
                self.call(slot, [libc::SYS_fcntl as u32, fd, libc::F_SETFD as u32, on.into()], reply)
            }
            What::Send { fd, count } => self.send(slot, fd, (count as usize).clamp(1, MAX_SENT)),
            What::Receive { cloexec } => self.receive(slot, cloexec),
            What::Thread { own_table } => self.thread(slot, own_table),
            What::End { thread } => {
                let number = self.another(slot, thread)?;
                let process = self.processes.get_mut(&slot)?;
                let ended = process.threads.get_mut(&number)?;
                let (id, task) = (process.id, ended.task);
                ended.gone = true;
                if number != process.leader {
                    process.threads.remove(&number);
                }
                self.expected.push((id, Expect::Exit { by: task, code: None }));
                self.push(slot, [protocol::END, number as u32, 0, 0, 0], Reply::Is([0; 4]), &[]);
                self.drop_tables();
                Some(())
            }
            What::Pass { thread } => {
                let number = self.another(slot, thread)?;
                self.push(slot, [protocol::PASS, number as u32, 0, 0, 0], Reply::Is([0; 4]), &[]);
                self.processes.get_mut(&slot)?.actor = number;
                Some(())
            }
            What::Rename => {
                let process = &self.processes[&slot];
                // A leader with another name would be filtered out.
                let twice = process.actor != process.leader;
                let renamed = (process.id, Expect::Rename { by: process.actor().task });
                self.expected.extend(std::iter::repeat_n(renamed, 1 + usize::from(twice)));
                self.push(slot, [protocol::RENAME, twice.into(), 0, 0, 0], Reply::Is([0; 4]), &[]);
                Some(())
            }
            What::Fork { share } => {
                if self.processes.len() > PUPPETS {
                    return None;
                }
                self.fork(slot, share)
            }
            What::Unshare => {
                let call = [libc::SYS_unshare as u32, libc::CLONE_FILES as u32, 0, 0];
                self.call(slot, call, Reply::Is([0; 4]));
                self.unshare(slot);
                Some(())
            }
            What::Exec => self.exec(slot),
            What::Exit { code } => {
                self.not_the_last()?;
                self.exit(slot, code);
                Some(())
            }
            What::Kill { puppet } => {
                self.not_the_last()?;
                let others: Vec<usize> = self.puppets().into_iter().filter(|other| *other != slot).collect();
                let victim = others[puppet as usize % others.len()];
                let touches = [Touch::Puppet(victim)];
                self.push(slot, [protocol::KILL, victim as u32, 0, 0, 0], Reply::Is([0; 4]), &touches);
                self.ends(victim, |_| Some(libc::SIGKILL as u32));
                Some(())
            }
            What::Quiesce => None,
        }
    }

    fn not_the_last(&self) -> Option<()> {
        // The stage and another.
        (self.processes.len() > 2).then_some(())
    }

    /// One of the threads that live and do not act.
    fn another(&self, slot: usize, number: u32) -> Option<usize> {
        let process = &self.processes[&slot];
        let others =
            process.threads.iter().filter(|(index, thread)| **index != process.actor && !thread.gone);
        let others: Vec<usize> = others.map(|(index, _)| *index).collect();
        others.get((number as usize).checked_rem(others.len())?).copied()
    }

    fn table_id(&self, slot: usize) -> TableId {
        self.processes[&slot].actor().table
    }

    fn table_of(&self, slot: usize) -> Table {
        self.tables[&self.table_id(slot)].clone()
    }

    fn table_mut(&mut self, slot: usize) -> &mut Table {
        let id = self.table_id(slot);
        self.tables.entry(id).or_default()
    }

    fn number(&mut self) -> u32 {
        self.next += 1;
        self.next
    }

    fn file(&mut self, kind: Option<Kind>) -> FileId {
        let id = self.number();
        self.kinds.insert(id, kind);
        id
    }

    fn table(&mut self, table: Table) -> TableId {
        let id = self.number();
        self.tables.insert(id, table);
        id
    }

    fn drop_tables(&mut self) {
        let threads = self.processes.values().flat_map(Process::alive);
        let used: BTreeSet<TableId> = threads.map(|thread| thread.table).collect();
        self.tables.retain(|id, _| used.contains(id));
    }

    fn push(&mut self, slot: usize, words: [u32; 5], reply: Reply, touches: &[Touch]) -> Option<()> {
        let own = [Touch::Puppet(slot), Touch::Table(self.table_id(slot))];
        let touches = own.iter().chain(touches).copied().collect();
        self.steps.push(Step { slot, words, touches, reply });
        Some(())
    }

    /// A call whose arguments are numbers and that changes no table.
    fn call(&mut self, slot: usize, [number, a, b, c]: [u32; 4], reply: Reply) -> Option<()> {
        self.push(slot, [protocol::CALL, number, a, b, c], reply, &[])
    }

    fn expect(&mut self, slot: usize, call: u32, change: u32, [fd, fd_last]: [u32; 2], file: Option<FileId>) {
        let process = &self.processes[&slot];
        let actor = process.actor();
        let event = Expect::Fd { by: actor.task, call, change, fd, fd_last, table: actor.table, file };
        self.expected.push((process.id, event));
    }

    /// A call that copies an fd; without a file it fails with EBADF.
    fn install(
        &mut self,
        slot: usize,
        call: [u32; 4],
        change: u32,
        made: Option<(FileId, u32)>,
        cloexec: bool,
    ) -> Option<()> {
        let Some((file, fd)) = made else {
            return self.call(slot, call, Reply::Is([-libc::EBADF, 0, 0, 0]));
        };
        let dup2_closes = self.rules.dup2_closes;
        let table = self.table_mut(slot);
        if table.len() >= MANY_FDS {
            return None;
        }
        if dup2_closes || change != FD_REPLACED || !table.contains_key(&fd) {
            table.insert(fd, Held { file, cloexec });
        }
        let file = table[&fd].file;
        self.expect(slot, call[0], change, [fd, fd], Some(file));
        self.call(slot, call, Reply::Is([fd as i32, 0, 0, 0]))
    }

    fn remove(
        &mut self,
        slot: usize,
        call: [u32; 4],
        change: u32,
        [first, last]: [u32; 2],
        from: impl FnOnce(&mut Table),
    ) -> Option<()> {
        if first > last {
            return self.call(slot, call, Reply::Is([-libc::EINVAL, 0, 0, 0]));
        }
        from(self.table_mut(slot));
        self.expect(slot, call[0], change, [first, last], None);
        self.call(slot, call, Reply::Is([0; 4]))
    }

    fn make(&mut self, slot: usize, kind: Kind, cloexec: bool) -> Option<()> {
        if self.table_of(slot).len() >= MANY_FDS {
            return None;
        }
        let flag = |flag: i32| if cloexec { flag as u32 } else { 0 };
        let file_flags = flag(libc::O_CLOEXEC);
        let datagram = libc::SOCK_DGRAM as u32 | flag(libc::SOCK_CLOEXEC);
        let (words, call) = match kind {
            Kind::Pipe => {
                let command = [protocol::PIPE, file_flags];
                return self.make_pair(slot, command, libc::SYS_pipe2 as u32, [Some(kind); 2], cloexec);
            }
            Kind::Socketpair => {
                let command = [protocol::SOCKETPAIR, datagram];
                return self.make_pair(slot, command, libc::SYS_socketpair as u32, [Some(kind); 2], cloexec);
            }
            Kind::File => ([protocol::OPEN, file_flags, 0, 0, 0], libc::SYS_openat),
            Kind::Memfd => {
                ([protocol::MEMFD, flag(libc::MFD_CLOEXEC as i32), 0, 0, 0], libc::SYS_memfd_create)
            }
            Kind::Socket => {
                let number = libc::SYS_socket;
                ([protocol::CALL, number as u32, libc::AF_INET as u32, datagram, 0], number)
            }
            Kind::Eventfd => {
                let number = libc::SYS_eventfd2;
                ([protocol::CALL, number as u32, 0, flag(libc::EFD_CLOEXEC), 0], number)
            }
            Kind::Epoll => {
                let number = libc::SYS_epoll_create1;
                ([protocol::CALL, number as u32, flag(libc::EPOLL_CLOEXEC), 0, 0], number)
            }
        };
        let fd = self.add(slot, Some(kind), call as u32, cloexec);
        self.push(slot, words, Reply::Is([fd as i32, 0, 0, 0]), &[])
    }

    fn make_pair(
        &mut self,
        slot: usize,
        [command, flags]: [u32; 2],
        call: u32,
        kinds: [Option<Kind>; 2],
        cloexec: bool,
    ) -> Option<()> {
        let [one, two] = kinds.map(|kind| self.add(slot, kind, call, cloexec));
        let reply = Reply::Is([0, one as i32, two as i32, 0]);
        self.push(slot, [command, flags, 0, 0, 0], reply, &[])
    }

    /// A new file at the lowest free fd.
    fn add(&mut self, slot: usize, kind: Option<Kind>, call: u32, cloexec: bool) -> u32 {
        let file = self.file(kind);
        let table = self.table_mut(slot);
        let fd = lowest(table, 0);
        table.insert(fd, Held { file, cloexec });
        self.expect(slot, call, FD_OPENED, [fd, fd], Some(file));
        fd
    }

    fn send(&mut self, slot: usize, fd: u32, count: usize) -> Option<()> {
        let table = self.table_of(slot);
        let fds = (fd..).take(count);
        let files: Option<Vec<FileId>> = fds.map(|fd| table.get(&fd).map(|held| held.file)).collect();
        // A mailbox that travels through itself is refused after some rounds, when depends on the kernel.
        let is_mailbox = |file: &FileId| table[&MAIL_IN].file == *file || table[&MAIL_OUT].file == *file;
        let words = [protocol::SEND, fd, count as u32, 0, 0];
        match files {
            None => self.push(slot, words, Reply::Is([-libc::EBADF, 0, 0, 0]), &[Touch::Mailbox]),
            Some(files) if files.iter().any(is_mailbox) || self.mailbox.len() >= MANY_MAILS => None,
            Some(files) => {
                self.mailbox.push_back(files);
                self.push(slot, words, Reply::Is([1, 0, 0, 0]), &[Touch::Mailbox])
            }
        }
    }

    fn receive(&mut self, slot: usize, cloexec: bool) -> Option<()> {
        let flags = if cloexec { libc::MSG_CMSG_CLOEXEC as u32 } else { 0 };
        let mut reply = [-libc::EAGAIN, 0, 0, 0];
        if let Some(files) = self.mailbox.pop_front() {
            reply[0] = files.len() as i32;
            for (file, to) in files.into_iter().zip(&mut reply[1..]) {
                let table = self.table_mut(slot);
                let fd = lowest(table, 0);
                table.insert(fd, Held { file, cloexec });
                *to = fd as i32;
                self.expect(slot, libc::SYS_recvmsg as u32, FD_OPENED, [fd, fd], Some(file));
            }
        }
        self.push(slot, [protocol::RECEIVE, flags, 0, 0, 0], Reply::Is(reply), &[Touch::Mailbox])
    }

    fn thread(&mut self, slot: usize, own_table: bool) -> Option<()> {
        let process = &self.processes[&slot];
        let number = (0..THREADS).find(|number| !process.threads.contains_key(number))?;
        let (id, by) = (process.id, process.actor().task);
        let mut flags = libc::CLONE_VM | libc::CLONE_FS | libc::CLONE_SIGHAND | libc::CLONE_THREAD;
        flags |= libc::CLONE_SYSVSEM | libc::CLONE_PARENT_SETTID | libc::CLONE_CHILD_CLEARTID;
        let task = self.number();
        let words = |flags: i32| [protocol::THREAD, number as u32, flags as u32, 0, 0];
        let table = if own_table {
            self.push(slot, words(flags), Reply::Task(task), &[]);
            self.table(self.table_of(slot))
        } else {
            self.push(slot, words(flags | libc::CLONE_FILES), Reply::Task(task), &[]);
            self.table_id(slot)
        };
        self.processes.get_mut(&slot)?.threads.insert(number, Thread { task, table, gone: false });
        self.expected.push((id, Expect::Clone { by, child: task, thread: true }));
        Some(())
    }

    fn fork(&mut self, slot: usize, share: bool) -> Option<()> {
        let child = (0..SLOTS).find(|slot| !self.slots_in_use.contains(slot))?;
        let task = self.number();
        let flags = libc::SIGCHLD | if share { libc::CLONE_FILES } else { 0 };
        let words = [protocol::FORK, child as u32, flags as u32, 0, 0];
        self.push(slot, words, Reply::Task(task), &[Touch::Puppet(child)]);
        let table = if share { self.table_id(slot) } else { self.table(self.table_of(slot)) };
        let process = &self.processes[&slot];
        let (parent, actor) = (process.id, process.actor);
        let by = process.actor().task;
        let threads = BTreeMap::from([(actor, Thread { task, table, gone: false })]);
        self.processes.insert(child, Process { id: task, parent, threads, leader: actor, actor });
        self.slots_in_use.insert(child);
        self.expected.push((parent, Expect::Clone { by, child: task, thread: false }));
        Some(())
    }

    /// Gives the acting thread a table of its own. Whether the kernel makes a new one or keeps one whose
    /// other users are on their way out is not known here.
    fn unshare(&mut self, slot: usize) -> Option<()> {
        let table = self.table(self.table_of(slot));
        let process = self.processes.get_mut(&slot)?;
        process.threads.get_mut(&process.actor)?.table = table;
        self.drop_tables();
        Some(())
    }

    fn exec(&mut self, slot: usize) -> Option<()> {
        self.push(slot, [protocol::EXEC, 0, 0, 0, 0], Reply::Is([0; 4]), &[]);
        let mut files = self.table_of(slot);
        files.retain(|_, held| !held.cloexec);
        let fd = lowest(&files, 0);
        let table = self.table(files);
        let process = self.processes.get_mut(&slot)?;
        let (id, old) = (process.id, process.actor().task);
        let others = process.alive().filter(|thread| thread.task != old);
        let exits = others.map(|thread| (id, Expect::Exit { by: thread.task, code: None }));
        self.expected.extend(exits.collect::<Vec<_>>());
        // The one who called has become the leader, under its id.
        process.threads = BTreeMap::from([(0, Thread { task: id, table, gone: false })]);
        (process.leader, process.actor) = (0, 0);
        let events = [Expect::Rename { by: id }, Expect::Exec { by: id, old }, Expect::Start { by: id, fd }];
        self.expected.extend(events.map(|event| (id, event)));
        self.drop_tables();
        Some(())
    }

    fn exit(&mut self, slot: usize, code: u32) {
        self.push(slot, [protocol::EXIT, code, 0, 0, 0], Reply::Is([0; 4]), &[]);
        let actor = self.processes[&slot].actor().task;
        self.ends(slot, |task| (task == actor).then_some(code << 8));
    }

    fn ends(&mut self, slot: usize, code: impl Fn(Task) -> Option<u32>) {
        if let Some(process) = self.processes.remove(&slot) {
            let exit =
                |thread: &Thread| (process.id, Expect::Exit { by: thread.task, code: code(thread.task) });
            self.expected.extend(process.alive().map(exit));
            self.ended.push(process.id);
            self.drop_tables();
        }
    }
}

/// Refuses what would cut the puppet off.
fn free(fd: u32) -> Option<()> {
    (fd >= PROTECTED).then_some(())
}

/// The lowest free fd from `from` on.
fn lowest(table: &Table, from: u32) -> u32 {
    let mut free = from;
    for fd in table.range(from..).map(|(fd, _)| *fd) {
        if fd != free {
            break;
        }
        free += 1;
    }
    free
}
