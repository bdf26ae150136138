//! Each built-in rule with a finding that it is for, and one beside it that it must leave alone.

use std::collections::BTreeSet;

use super::*;

/// `name`, `name in module`, or `name @ source`; `?` is a function without a name.
fn stack(lines: &[&str]) -> Vec<Function> {
    let function = |line: &&str| {
        let (line, file) = line.split_once(" @ ").map_or((*line, None), |(line, file)| (line, Some(file)));
        let (name, module) = line.split_once(" in ").unwrap_or((line, "/usr/bin/app"));
        Function {
            function: Some(name.to_owned()).filter(|name| name != "?"),
            file: file.map(str::to_owned),
            line: file.map(|_| 7),
            inlined: false,
            module: Some(module.to_owned()),
            build_id: None,
            offset: "10".to_owned(),
            uncertain: false,
        }
    };
    lines.iter().map(function).collect()
}

struct Case {
    rule: &'static str,
    kind: Kind,
    /// Of a thread its name, of an fd its target.
    what: [&'static str; 2],
    /// The first is suppressed, the second is not.
    stacks: [&'static [&'static str]; 2],
}

const fn thread(rule: &'static str, what: [&'static str; 2], stacks: [&'static [&'static str]; 2]) -> Case {
    Case { rule, kind: Kind::Thread, what, stacks }
}

const fn fd(rule: &'static str, what: [&'static str; 2], stacks: [&'static [&'static str]; 2]) -> Case {
    Case { rule, kind: Kind::Fd, what, stacks }
}

const fn of(kind: Kind, rule: &'static str, stacks: [&'static [&'static str]; 2]) -> Case {
    Case { rule, kind, what: ["/tmp/file"; 2], stacks }
}

const CREATE: &str = "pthread_create in /lib/x86_64-linux-gnu/libc.so.6";
const JVM: &str =
    "os::create_thread(Thread*, os::ThreadType, unsigned long) in /usr/lib/jvm/17/lib/server/libjvm.so";
const JVM_BARE: &str = "? in /usr/lib/jvm/17/lib/server/libjvm.so";
const GLIB_NEW: &str = "g_thread_new in /usr/lib/libglib-2.0.so.0";

const CASES: &[Case] = &[
    fd(
        "listening-sockets",
        ["tcp 127.0.0.1:80 LISTEN", "tcp 10.0.0.1:80 -> 10.0.0.2:9 CLOSE_WAIT"],
        [&[], &[]],
    ),
    thread(
        "go-threads",
        ["app"; 2],
        [
            &["runtime.clone", "runtime.newosproc", "runtime.newm1", "runtime.newm", "runtime.startm"],
            // A goroutine that calls C, which starts a thread.
            &[CREATE, "start_worker", "runtime.asmcgocall", "runtime.cgocall", "main.main"],
        ],
    ),
    thread(
        "go-threads-cgo",
        ["app"; 2],
        [
            &[
                CREATE,
                "_cgo_try_pthread_create",
                "_cgo_sys_thread_start",
                "x_cgo_thread_start",
                "runtime.asmcgocall",
            ],
            &[CREATE, "start_worker", "crosscall1"],
        ],
    ),
    fd(
        "go-poller",
        ["eventpoll"; 2],
        [
            &["runtime.netpollinit", "runtime.netpollGenericInit", "internal/poll.runtime_pollServerInit"],
            &["syscall.EpollCreate1", "main.main"],
        ],
    ),
    of(
        Kind::Fd,
        "go-asm-sources",
        [
            &["syscall.Open", "os.Open", "cmd/asm/internal/lex.NewLexer", "main.main", "runtime.main"],
            &["syscall.Open", "os.Open", "main.NewLexer", "main.main", "runtime.main"],
        ],
    ),
    thread(
        "jvm-service-threads",
        ["C2 CompilerThre", "pool-1-thread"],
        [&[CREATE, JVM, "JVM"], &[CREATE, JVM]],
    ),
    thread("jdk-service-threads", ["process reaper", "Thread"], [&[CREATE, JVM_BARE], &[CREATE, JVM_BARE]]),
    thread("jdk-common-pool", ["ForkJoinPool.co", "ForkJoinPool"], [&[CREATE, JVM], &[CREATE, JVM]]),
    thread(
        "jvm-main-thread",
        ["java"; 2],
        [
            &[
                "clone3 in libc.so.6",
                CREATE,
                "CallJavaMainInNewThread in /usr/lib/jvm/17/lib/libjli.so",
                "JLI_Launch",
            ],
            // Native code in the main thread.
            &[CREATE, "native_start in /app/libnative.so", "JavaMain in /usr/lib/jvm/17/lib/libjli.so"],
        ],
    ),
    thread(
        "tokio-threads",
        ["tokio-rt-worker"; 2],
        [
            &[CREATE, "std::thread::Builder::spawn", "tokio::runtime::blocking::pool::Spawner::spawn_thread"],
            // A thread that code in spawn_blocking starts.
            &[
                CREATE,
                "std::thread::spawn",
                "app::work",
                "tokio::runtime::blocking::pool::Inner::run",
                "tokio::runtime::blocking::pool::Spawner::spawn_thread::{{closure}}",
            ],
        ],
    ),
    thread(
        "tokio-threads-inlined",
        ["my-pool"; 2],
        [
            &[
                CREATE,
                "spawn<F> @ /rustc/1/library/std/src/thread/mod.rs",
                const_pool("spawn_thread"),
                const_pool("spawn_task"),
            ],
            &[CREATE, "spawn_thread @ src/app.rs", "main @ src/main.rs", const_pool("run")],
        ],
    ),
    thread(
        "rayon-global-pool",
        ["app"; 2],
        [
            &[
                CREATE,
                "<rayon_core::registry::DefaultSpawn as rayon_core::registry::ThreadSpawn>::spawn",
                "rayon_core::registry::Registry::new",
                "rayon_core::registry::set_global_registry::{{closure}}",
            ],
            // A pool of the program's own, which it has to drop.
            &[
                CREATE,
                "rayon_core::registry::Registry::new",
                "rayon_core::ThreadPoolBuilder<S>::build",
                "app::main",
            ],
        ],
    ),
    thread(
        "blocking-pool",
        ["blocking"; 2],
        [
            &[
                CREATE,
                "std::thread::Builder::spawn",
                "blocking::Executor::grow_pool",
                "blocking::Executor::schedule",
            ],
            &[
                CREATE,
                "app::work",
                "blocking::Executor::main_loop",
                "blocking::Executor::grow_pool::{{closure}}",
            ],
        ],
    ),
    thread(
        "async-io-thread",
        ["async-io", "app"],
        [
            &[CREATE, "std::thread::Builder::spawn", "async_io::driver::unparker::{{closure}}"],
            &[CREATE, "std::thread::spawn", "app::poll", "async_io::driver::block_on"],
        ],
    ),
    thread(
        "libuv-pool",
        ["node"; 2],
        [
            &[
                CREATE,
                "uv_thread_create_ex",
                "init_threads",
                "init_once",
                "pthread_once",
                "uv_once",
                "uv__work_submit",
            ],
            &[CREATE, "uv_thread_create_ex", "uv_thread_create", "app_start", "main"],
        ],
    ),
    thread(
        "libuv-pool-stripped",
        ["app"; 2],
        [
            &[
                CREATE,
                "uv_thread_create_ex in /usr/lib/libuv.so.1.0.0",
                "? in /usr/lib/libuv.so.1.0.0",
                "pthread_once in /lib/libc.so.6",
                "uv_once in /usr/lib/libuv.so.1.0.0",
            ],
            &[
                CREATE,
                "uv_thread_create_ex in /usr/lib/libuv.so.1.0.0",
                "uv_thread_create in /usr/lib/libuv.so.1.0.0",
                "app_start",
                "pthread_once in /lib/libc.so.6",
            ],
        ],
    ),
    thread(
        "node-platform",
        ["node"; 2],
        [
            &[
                CREATE,
                "uv_thread_create_ex",
                "uv_thread_create",
                "node::WorkerThreadsTaskRunner::WorkerThreadsTaskRunner(int)",
                "node::NodePlatform::NodePlatform(int, v8::TracingController*, v8::PageAllocator*)",
            ],
            &[
                CREATE,
                "uv_thread_create_ex",
                "node::worker::Worker::StartThread(v8::FunctionCallbackInfo<v8::Value>)",
            ],
        ],
    ),
    thread(
        "node-inspector",
        ["node"; 2],
        [
            &[
                CREATE,
                "node::inspector::Agent::Start(std::string const&, node::DebugOptions const&)",
                "node::Start",
            ],
            &[CREATE, "addon_start in /app/addon.node", "node::inspector::Agent::Start()"],
        ],
    ),
    thread(
        "v8-platform",
        ["app"; 2],
        [
            &[
                CREATE,
                "v8::base::Thread::Start()",
                "v8::platform::DefaultWorkerThreadsTaskRunner::DefaultWorkerThreadsTaskRunner(unsigned int, double (*)())",
            ],
            &[CREATE, "v8::base::Thread::Start()", "app::Watch::Watch()"],
        ],
    ),
    of(
        Kind::ExecFd,
        "v8-logs",
        [
            &[
                "open in /lib/libc.so.6",
                "fopen in /lib/libc.so.6",
                "v8::base::OS::FOpen(char const*, char const*)",
                "v8::internal::LinuxPerfBasicLogger::LinuxPerfBasicLogger(v8::internal::Isolate*)",
            ],
            &["open in /lib/libc.so.6", "fopen in /lib/libc.so.6", "addon::Init(v8::Local<v8::Object>)"],
        ],
    ),
    of(
        Kind::DoubleClose,
        "shell-close",
        [
            &["__close in /lib/libc.so.6", "? in /usr/bin/bash", "execute_command_internal in /usr/bin/bash"],
            // A builtin that was loaded, in C.
            &[
                "__close in /lib/libc.so.6",
                "finfo_builtin in /usr/lib/bash/finfo",
                "execute_command_internal in /usr/bin/bash",
            ],
        ],
    ),
    of(
        Kind::ExecFd,
        "bash-redirections",
        [
            &[
                "open in /lib/libc.so.6",
                "? in /usr/bin/bash",
                "do_redirections in /usr/bin/bash",
                "execute_command_internal in /usr/bin/bash",
            ],
            &[
                "open in /lib/libc.so.6",
                "finfo_builtin in /usr/lib/bash/finfo",
                "execute_command_internal in /usr/bin/bash",
            ],
        ],
    ),
    of(
        Kind::ExecFd,
        "dash-redirections",
        [
            &["open64 in /lib/libc.so.6", "? in /usr/bin/dash", "? in /usr/bin/dash"],
            &["pipe in /lib/libc.so.6", "? in /usr/bin/dash", "? in /usr/bin/dash"],
        ],
    ),
    thread(
        "glibc-timer",
        ["app"; 2],
        [
            &[
                CREATE,
                "? in /lib/libc.so.6",
                "pthread_once in /lib/libc.so.6",
                "timer_create in /lib/libc.so.6",
                "main",
            ],
            // What runs the callback of the user.
            &[CREATE, "timer_helper_thread in /lib/libc.so.6", "start_thread in /lib/libc.so.6"],
        ],
    ),
    thread(
        "glibc-aio",
        ["app"; 2],
        [
            &[CREATE, "? in /lib/libc.so.6", "aio_read in /lib/libc.so.6", "main"],
            &[CREATE, "my_aio_read", "main"],
        ],
    ),
    thread(
        "glibc-getaddrinfo_a",
        ["app"; 2],
        [
            &[CREATE, "__gai_enqueue_request in /lib/libc.so.6", "getaddrinfo_a in /lib/libc.so.6", "main"],
            &[CREATE, "resolve", "main"],
        ],
    ),
    fd(
        "glibc-mq_notify",
        ["netlink"; 2],
        [
            &[
                "socket in /lib/libc.so.6",
                "init_mq_netlink in /lib/libc.so.6",
                "pthread_once",
                "mq_notify",
                "main",
            ],
            &["socket in /lib/libc.so.6", "notify", "main"],
        ],
    ),
    thread(
        "libgomp-pool",
        ["app"; 2],
        [
            &[CREATE, "gomp_team_start", "GOMP_parallel", "main"],
            &[CREATE, "main._omp_fn.0", "gomp_thread_start"],
        ],
    ),
    thread(
        "libgomp-pool-stripped",
        ["app"; 2],
        [
            &[CREATE, "? in /usr/lib/libgomp.so.1.0.0", "GOMP_parallel in /usr/lib/libgomp.so.1.0.0", "main"],
            // A thread that code in a parallel region starts.
            &[CREATE, "main._omp_fn.0", "GOMP_parallel in /usr/lib/libgomp.so.1.0.0", "main"],
        ],
    ),
    thread(
        "llvm-openmp-pool",
        ["app"; 2],
        [
            &[
                CREATE,
                "__kmp_create_worker in /usr/lib/libomp.so.5",
                "__kmp_allocate_thread",
                "__kmp_fork_call",
            ],
            &[CREATE, ".omp_outlined.", "__kmp_invoke_microtask in /usr/lib/libomp.so.5", "__kmp_fork_call"],
        ],
    ),
    thread(
        "openblas-pool",
        ["app"; 2],
        [
            &[CREATE, "blas_thread_init in /usr/lib/libopenblas.so.0", "gotoblas_init"],
            &[CREATE, "app_init", "main"],
        ],
    ),
    thread(
        "jemalloc-background",
        ["jemalloc_bg_thd", "app"],
        [
            &[CREATE, "? in /usr/lib/libjemalloc.so.2"],
            // jemalloc is in between whenever a program calls pthread_create.
            &[CREATE, "pthread_create in /usr/lib/libjemalloc.so.2", "main"],
        ],
    ),
    thread(
        "glib-main-and-pool",
        ["gmain"; 2],
        [
            &[CREATE, "? in /usr/lib/libglib-2.0.so.0", GLIB_NEW, "? in /usr/lib/libglib-2.0.so.0"],
            &[
                CREATE,
                "? in /usr/lib/libglib-2.0.so.0",
                GLIB_NEW,
                "app_start",
                "g_main_loop_run in /usr/lib/libglib-2.0.so.0",
            ],
        ],
    ),
    thread(
        "glib-gdbus",
        ["gdbus"; 2],
        [
            &[CREATE, GLIB_NEW, "? in /usr/lib/libgio-2.0.so.0"],
            &[CREATE, GLIB_NEW, "app_start", "? in /usr/lib/libgio-2.0.so.0"],
        ],
    ),
];

const fn const_pool(function: &'static str) -> &'static str {
    match function.as_bytes() {
        b"spawn_thread" => {
            "spawn_thread @ /root/.cargo/registry/src/index/tokio-1.54.1/src/runtime/blocking/pool.rs"
        }
        b"spawn_task" => {
            "spawn_task @ /root/.cargo/registry/src/index/tokio-1.54.1/src/runtime/blocking/pool.rs"
        }
        _ => "run @ /root/.cargo/registry/src/index/tokio-1.54.1/src/runtime/blocking/pool.rs",
    }
}

fn found<'a>(rules: &'a Suppressions, case: &Case, at: usize) -> Option<&'a str> {
    let stack = stack(case.stacks[at]);
    let is_thread = case.kind == Kind::Thread;
    let subject = Subject {
        kind: case.kind,
        comm: "app",
        syscall: if is_thread { "clone3" } else { "socket" },
        resource: match case.kind {
            Kind::Thread => "",
            Kind::DoubleClose => "pipe",
            _ => "socket",
        },
        target: if is_thread { "" } else { case.what[at] },
        thread: if is_thread { case.what[at] } else { "" },
        stack: &stack,
    };
    rules.of(&subject).map(|rule| rule.name.as_str())
}

#[test]
fn each_rule_is_for_what_it_says_and_leaves_what_is_beside_it() {
    let rules = Suppressions::builtin();
    for case in CASES {
        assert_eq!(found(&rules, case, 0), Some(case.rule));
        assert_eq!(found(&rules, case, 1), None, "{}", case.rule);
    }
}

#[test]
fn each_rule_has_a_case_and_a_reason() {
    let rules = Suppressions::builtin();
    let names: BTreeSet<_> = rules.builtin.iter().map(|rule| rule.name.as_str()).collect();
    assert_eq!(names.len(), rules.builtin.len(), "names are unique");
    assert_eq!(names, CASES.iter().map(|case| case.rule).collect());
    assert!(rules.builtin.iter().all(|rule| rule.reason.len() > 30));
}

/// As /proc has them with OpenJDK 17 and 25, whole and as types.
#[test]
fn names_of_the_jvm_are_known() {
    let rules = Suppressions::builtin();
    let stack = stack(&["clone3 in /lib/libc.so.6", CREATE, JVM]);
    let of = |thread| {
        let subject = Subject {
            kind: Kind::Thread,
            comm: "java",
            syscall: "",
            resource: "",
            target: "",
            thread,
            stack: &stack,
        };
        rules.of(&subject).is_some()
    };
    for own in [
        "GC Thread#0",
        "GC Thread",
        "G1 Conc#0",
        "G1 Main Marker",
        "G1 Refine",
        "G1 Service",
        "Shenandoah Cont",
        "Shenandoah GC T",
        "ZDirector",
        "ZDriverMinor",
        "ZStat",
        "ZUncommitter#0",
        "ZUnmapper",
        "ZWorkerOld#0",
        "RuntimeWorker#1",
        "C1 CompilerThre",
        "Sweeper thread",
        "VM Thread",
        "VM Periodic Tas",
        "Service Thread",
        "Monitor Deflati",
        "Notification Th",
        "Signal Dispatch",
        "Attach Listener",
        "Reference Handl",
        "Finalizer",
        "Common-Cleaner",
        "process reaper",
        "process reaper ",
    ] {
        assert!(of(own), "{own}");
    }
    for of_application in
        ["main", "Thread-1", "Timer-0", "pool-1-thread-1", "http-nio-8080-e", "ForkJoinPool-1-", "GC"]
    {
        assert!(!of(of_application), "{of_application}");
    }
}
