//! What is measured: plumb in each of its modes, the floors below it, and its peers. A new way to run any
//! of them is a line here.

/// One row of the tables.
pub(crate) struct Subject {
    pub(crate) name: &'static str,
    pub(crate) what: What,
}

/// What is attached to the kernel, and how.
pub(crate) enum What {
    /// The control: its two sides differ by nothing but noise.
    Nothing,
    /// Empty programs of ebpf/src/bin/floor.rs, by name.
    Empty(&'static [&'static str]),
    /// Processes, started in this order.
    Programs(&'static [Program]),
}

/// A process that is started. In its words `{plumb}` and `{self}` are executables, `{pid}` the process that
/// does the operations, `{dir}` a folder of this run, `{port}` a free port.
pub(crate) struct Program {
    pub(crate) words: &'static [&'static str],
    /// When it is at work.
    pub(crate) ready: Ready,
    /// False for one that only makes the others work: its CPU time and memory are not theirs.
    pub(crate) counted: bool,
    pub(crate) events: Events,
}

/// How to tell that a program is at work.
pub(crate) enum Ready {
    /// It has printed this.
    Prints(&'static str),
    /// It prints events of the operations.
    SeesEvents,
    /// It takes connections at `{port}`.
    Listens,
    /// As soon as it runs.
    Runs,
}

/// What its output says about the opens and closes of one process.
pub(crate) enum Events {
    /// Nothing.
    None,
    /// A line per event with this in it; so many events per open+close.
    Lines { containing: &'static str, each: u64 },
    /// The numbers at the ends of such lines are counts; two events per open+close.
    Sums { containing: &'static str },
}

const SCHED: &[&str] = &["task_newtask", "sched_process_exec", "task_rename", "sched_process_exit"];

/// The agent with this setting of `fd_events`.
macro_rules! agent {
    ($fd_events:literal) => {
        program(
            &[
                "{plumb}",
                "agent",
                "--fd-events",
                $fd_events,
                "--listen",
                "127.0.0.1:{port}",
                "--run-dir",
                "{dir}",
                "--state-dir",
                "{dir}/state",
                "--log-format",
                "json",
            ],
            Ready::Prints("follows "),
            Events::None,
        )
    };
}

/// The agent alone.
pub(crate) const IDLE_AGENT: &[Program] = &[agent!("auto")];

const fn program(words: &'static [&'static str], ready: Ready, events: Events) -> Program {
    Program { words, ready, counted: true, events }
}

const fn watch(words: &'static [&'static str], events: Events) -> Program {
    program(words, Ready::Prints("plumb: watching"), events)
}

/// plumb, and what any program on the same hooks costs.
pub(crate) static OWN: [Subject; 8] = [
    Subject { name: "nothing (control)", what: What::Nothing },
    Subject { name: "empty programs on clone, exec, rename, exit", what: What::Empty(SCHED) },
    Subject { name: "empty program on sys_exit", what: What::Empty(&["sys_exit"]) },
    Subject {
        name: "plumb agent, fd_events = watched, nobody watched",
        what: What::Programs(&[agent!("watched")]),
    },
    Subject { name: "plumb agent, fd_events = always", what: What::Programs(&[agent!("always")]) },
    Subject {
        name: "plumb agent and `plumb watch --count` of this process",
        what: What::Programs(&[
            agent!("watched"),
            watch(&["{plumb}", "watch", "--pid", "{pid}", "--count"], Events::None),
        ]),
    },
    Subject {
        name: "plumb agent and `plumb watch -o jsonl` of this process",
        what: What::Programs(&[
            agent!("watched"),
            watch(
                &["{plumb}", "watch", "--pid", "{pid}", "-o", "jsonl"],
                Events::Lines { containing: r#""pid":{pid},"#, each: 2 },
            ),
        ]),
    },
    Subject {
        name: "plumb agent and `plumb watch --origins -o jsonl` of this process",
        what: What::Programs(&[
            agent!("watched"),
            watch(
                &["{plumb}", "watch", "--pid", "{pid}", "--origins", "-o", "jsonl"],
                Events::Lines { containing: r#""pid":{pid},"#, each: 2 },
            ),
        ]),
    },
];

const COUNTING: &str = "
    tracepoint:syscalls:sys_exit_openat { @opens[pid] = count(); }
    tracepoint:syscalls:sys_exit_close { @closes[pid] = count(); }
    interval:ms:100 /!@told/ { printf(\"attached\\n\"); @told = 1; }";

const PRINTING: &str = "
    tracepoint:syscalls:sys_exit_openat { printf(\"%d open %d\\n\", pid, args->ret); }
    tracepoint:syscalls:sys_exit_close { printf(\"%d close %d\\n\", pid, args->ret); }";

/// Every process, by name.
pub(crate) const PROCESS_EXPORTER_CONFIG: &str = "process_names:\n- name: '{{.Comm}}'\n  cmdline: ['.*']\n";

/// Tools of Debian that answer a part of the same question.
pub(crate) static PEERS: [Subject; 5] = [
    Subject {
        name: "bpftrace, counts per process",
        what: What::Programs(&[program(
            &["bpftrace", "-e", COUNTING],
            Ready::Prints("attached"),
            Events::Sums { containing: "[{pid}]: " },
        )]),
    },
    Subject {
        name: "bpftrace, prints events",
        what: What::Programs(&[program(
            &["bpftrace", "-e", PRINTING],
            Ready::SeesEvents,
            Events::Lines { containing: "{pid} ", each: 2 },
        )]),
    },
    Subject {
        name: "opensnoop (libbpf-tools)",
        what: What::Programs(&[program(
            &["opensnoop"],
            Ready::SeesEvents,
            Events::Lines { containing: "{pid} ", each: 1 },
        )]),
    },
    Subject {
        name: "perf trace -e openat,close",
        what: What::Programs(&[program(
            &["perf", "trace", "-e", "openat,close"],
            Ready::SeesEvents,
            Events::Lines { containing: "/{pid} ", each: 2 },
        )]),
    },
    Subject {
        name: "process-exporter, a scrape per second",
        what: What::Programs(&[
            program(
                &[
                    "prometheus-process-exporter",
                    "-web.listen-address",
                    "127.0.0.1:{port}",
                    "-config.path",
                    "{dir}/process-exporter.yml",
                ],
                Ready::Listens,
                Events::None,
            ),
            Program {
                words: &["{self}", "scrape", "127.0.0.1:{port}"],
                ready: Ready::Runs,
                counted: false,
                events: Events::None,
            },
        ]),
    },
];
