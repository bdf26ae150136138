//! The agent, put together: the only place that knows both the kernel side and the exporters.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::Extension;
use rustix::net::sockopt::set_socket_passcred;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{
    net::{TcpListener, UnixListener},
    sync::{
        Mutex as AsyncMutex,
        mpsc::{self, channel},
        watch,
    },
};

use crate::{
    api::{self, Limits},
    ask::Asker,
    clock,
    config::{self, Config},
    detect::{Detector, HostLimits},
    drain::{self, Driver, Told},
    export::prometheus::Own,
    failure::{Exit, Failure},
    host::Host,
    kernel::{self, Kernel, Plan},
    lock::{self, Lock},
    observe::{self, Input},
    peer::Peer,
    report,
    services::{self, Services},
    stacks::{self, Done},
    state::{self, StateDir},
    subscribe::Subscribers,
    supervisor::{Supervisor, on_thread},
    view::HostView,
};

/// Observations under way between the observer and the table's owner; beyond it the observer waits.
const QUEUE: usize = 64;
/// Time the workers have to stop.
const STOP_DEADLINE: Duration = Duration::from_secs(5);

/// Fds that the agent may have open: each process of a drain takes two, and whoever starts it may allow 1,024.
const MAX_FDS: u64 = 65_536;

/// As far as the hard limit lets it.
fn raise_fd_limit() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = maximum.unwrap_or(MAX_FDS).min(MAX_FDS);
    if current.is_some_and(|current| current < wanted)
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum })
    {
        tracing::warn!(
            "the limit of open files is not raised: {error}; a drain of many processes may not work"
        );
    }
}

/// Runs the agent until `shutdown`, which names the signal. What it attached goes with it.
pub(crate) async fn run(config: Config, shutdown: impl Future<Output = &'static str>) -> Result<(), Failure> {
    let usr1 = drain::usr1()?;
    raise_fd_limit();
    kernel::require_capabilities()?;
    let lock = lock(&config.run_dir).await?;
    let tcp = listen(&config).await?;
    // As bound: port 0 has become a real one.
    let address = tcp.local_addr().unwrap_or(config.listen);
    let (unix, socket) = listen_unix(config::socket(&config.run_dir), 0o600)?;
    let (everybodys, open_socket) = listen_unix(config::open_socket(&config.run_dir), 0o666)?;
    let kernel = Kernel::load_required(Plan::AGENT)?;
    for status in kernel.programs().iter().filter(|status| !status.is_fine()) {
        tracing::warn!(
            program = status.program.name,
            verdict = status.verdict.word(),
            "no {}: {}",
            status.program.gives,
            status.verdict.explain()
        );
    }

    let (state, state_lock) = state_dir(&config.state_dir).await?.unzip();
    let own =
        Own::new().map_err(|error| Failure::new(Exit::Error, error.to_string(), "this is a bug of plumb"))?;
    let (views, view) = watch::channel(Arc::new(HostView::default()));
    let (inputs, observed) = channel(QUEUE);
    let named = inputs.clone();
    let (ask, requests) = Asker::new().map_err(|error| {
        Failure::new(Exit::Error, format!("no eventfd: {error}"), "raise the limit of open files")
    })?;
    let limits = observe::Limits { fd_events: config.fd_events, max_processes: config.max_processes };
    let (subscribers, followers, bell) = (Subscribers::default(), ask.clone(), ask.bell());
    let asks = ask.clone();
    let (stacks, inbox) = stacks::Queue::new();
    let waker = stacks.clone();
    let said = inputs.clone();
    let mut supervisor = Supervisor::default();

    // Each worker gets what it needs anew at each start; what cannot be made twice is lent and given back.
    let first = Arc::new(Mutex::new(Some(kernel)));
    let requests = Arc::new(Mutex::new(requests));
    let kept = Arc::new(Mutex::new(observe::Kept::default()));
    supervisor.spawn("observer", move |stop| {
        let (first, requests, inputs) = (Arc::clone(&first), Arc::clone(&requests), inputs.clone());
        let (kept, stacks) = (Arc::clone(&kept), stacks.clone());
        let (bell, ending) = (bell.clone(), stop.clone());
        let to_end = bell.clone();
        tokio::spawn(async move {
            ending.cancelled().await;
            to_end.ring();
        });
        on_thread("observer", move || {
            let loaded = first.lock().unwrap_or_else(PoisonError::into_inner).take();
            let kernel = match loaded {
                Some(kernel) => kernel,
                None => Kernel::load_required(Plan::AGENT)?,
            };
            let requests = requests.lock().unwrap_or_else(PoisonError::into_inner);
            let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
            observe::run(kernel, &limits, &mut kept, (&requests, &bell), (&inputs, &stacks), &stop)
        })
    });

    let inbox = Arc::new(Mutex::new(inbox));
    supervisor.spawn("stacks", move |stop| {
        let (inbox, named) = (Arc::clone(&inbox), named.clone());
        let (ending, to_end) = (stop.clone(), waker.clone());
        tokio::spawn(async move {
            ending.cancelled().await;
            to_end.wake();
        });
        on_thread("stacks", move || {
            let inbox = inbox.lock().unwrap_or_else(PoisonError::into_inner);
            let give = |done| {
                let input = match done {
                    Done::Named(stacks) => Input::Named(stacks),
                    Done::Census(process, threads) => Input::Threads(process, threads),
                };
                named.blocking_send(input).is_ok()
            };
            stacks::run(&inbox, give, &stop);
            Ok(())
        })
    });

    let observed = Arc::new(AsyncMutex::new(observed));
    let settings = config.settings.clone();
    let kept_in = state.as_ref().map(|_| config.state_dir.clone());
    let keeper = state.clone().map(state::keeper);
    let findings = keeper.as_ref().map(|(newest, _)| newest.clone());
    let (host, format, counted, published) =
        (host_limits(), config.log_format, own.clone(), subscribers.clone());
    supervisor.spawn("table", move |stop| {
        let counted = counted.clone();
        let report = Box::new(move |news: &_| {
            counted.reported(news);
            report::log(news, format);
        });
        let mut detector = Detector::new(host, settings.clone());
        if let Some(state) = &state {
            restore(&mut detector, state);
        }
        let newest = findings.clone();
        let keep = Box::new(move |saved| {
            if let Some(newest) = &newest {
                newest.send_replace(saved);
            }
        });
        let host = Host::new(detector, ask.clone(), views.clone(), published.clone(), report, keep);
        let observed = Arc::clone(&observed);
        async move {
            host.run(&mut *observed.lock().await, stop).await;
            Ok(())
        }
    });

    let mut ready = view.clone();
    let drained = own.clone();
    let shared = api::Shared { views: view, workers: supervisor.workers(), own, started: clock::boottime() };
    let (tcp, unix) = (Arc::new(tcp), Arc::new(unix));
    let public = api::public(shared.clone());
    supervisor.spawn("metrics", move |stop| {
        let (listener, router) = (Arc::clone(&tcp), public.clone());
        async move {
            api::serve(api::Tcp(listener), move |_| router.clone(), Limits::AGENT, stop).await;
            Ok(())
        }
    });
    let (drain, drains) = spawn_drain(&mut supervisor, &config, kept_in, (&subscribers, &asks), &drained)?;
    let services = Services { commands: drain.clone(), views: drains.clone() };
    let open = services::router(services.clone());
    let events = api::Events { subscribers, requests: followers, inputs: said };
    let control = api::control(shared, events, services);
    supervisor.spawn("control", move |stop| {
        let (listener, router) = (Arc::clone(&unix), control.clone());
        async move {
            let of_admin = move |stream: &_| router.clone().layer(Extension(Peer::of(stream, true)));
            api::serve(api::Unix(listener), of_admin, Limits::CONTROL, stop).await;
            Ok(())
        }
    });
    let everybodys = Arc::new(everybodys);
    supervisor.spawn("services", move |stop| {
        let (listener, router) = (Arc::clone(&everybodys), open.clone());
        async move {
            let of_user = move |stream: &_| router.clone().layer(Extension(Peer::of(stream, false)));
            api::serve(api::Unix(listener), of_user, Limits::AGENT, stop).await;
            Ok(())
        }
    });

    tokio::pin!(shutdown);
    let first_pass = async {
        if ready.changed().await.is_ok() {
            let view = ready.borrow();
            tracing::info!(
                "follows {} processes; metrics on http://{}/metrics; stop with ctrl-c",
                view.rows.len(),
                address
            );
        }
        std::future::pending::<()>().await;
    };
    let host = drain::Shutdown::new(drain.clone(), drains.clone(), config.drain.deadline);
    let signal = tokio::select! {
        name = &mut shutdown => name,
        () = first_pass => "",
        () = drain::on_usr1(&drain, usr1) => "",
        () = host.wait() => "",
    };
    if config.drain_on_sigterm {
        drain::all(&drain, drains, signal, None).await;
    } else {
        host.at_end().await;
    }
    tracing::info!("stops");
    let late = supervisor.stop(STOP_DEADLINE).await;
    if let Some((newest, keeper)) = keeper {
        drop(newest);
        if tokio::time::timeout(STOP_DEADLINE, keeper).await.is_err() {
            tracing::warn!("the last findings are not kept: the disk is slow");
        }
    }
    drop((socket, open_socket));
    drop((lock, state_lock));
    if late.is_empty() {
        return Ok(());
    }
    let cause = format!("workers did not stop within {} s: {}", STOP_DEADLINE.as_secs(), late.join(", "));
    Err(Failure::new(Exit::Error, cause, "the process ends all the same, and its probes with it"))
}

/// Without a state folder findings and reports begin anew with each agent; one that another agent uses is refused.
async fn state_dir(folder: &Path) -> Result<Option<(StateDir, File)>, Failure> {
    let error = match StateDir::open(folder, boot_id()) {
        Ok(state) => match lock::take(folder).await {
            Ok(Lock::Taken(lock)) => return Ok(Some((state, lock))),
            Ok(Lock::Held(pid)) => {
                let cause = format!("another agent (pid {pid}) keeps its findings in {}", folder.display());
                return Err(Failure::new(
                    Exit::Error,
                    cause,
                    "name another folder with --state-dir, or stop it first",
                ));
            }
            Err(error) => error.into(),
        },
        Err(error) => error,
    };
    tracing::warn!(
        "neither findings nor reports of drains are kept over a restart: the folder {} cannot be used: {error:#}; name \
         another with --state-dir",
        folder.display()
    );
    Ok(None)
}

/// Takes up what an agent before this one has found.
fn restore(detector: &mut Detector, state: &StateDir) {
    let why = match state.load() {
        Ok(saved) => {
            if detector.restore(saved, clock::boottime()) {
                return;
            }
            "it is not what plumb writes".to_owned()
        }
        Err(error) => format!("{error:#}"),
    };
    let aside = state.set_aside();
    tracing::warn!("findings begin anew: what was kept is refused: {why}; it is now {}", aside.display());
}

/// Takes the lock that makes this agent the only one with this run folder.
async fn lock(run_dir: &Path) -> Result<File, Failure> {
    let failure = |error: io::Error| {
        let cause = format!("cannot use the run folder {}: {error}", run_dir.display());
        Failure::new(Exit::Error, cause, "name a writable folder with --run-dir")
    };
    fs::DirBuilder::new().recursive(true).mode(0o711).create(run_dir).map_err(failure)?;
    if fs::metadata(run_dir).map_err(failure)?.permissions().mode() & 0o022 != 0 {
        // Whoever can write there could put a link in the place of the lock or of the socket.
        let cause = format!("the run folder {} can be written by others", run_dir.display());
        return Err(Failure::new(
            Exit::Error,
            cause,
            "take that away with chmod, or name another with --run-dir",
        ));
    }
    match lock::take(run_dir).await.map_err(failure)? {
        Lock::Taken(lock) => Ok(lock),
        Lock::Held(pid) => {
            let cause = format!("another agent is running (pid {pid})");
            Err(Failure::new(
                Exit::Error,
                cause,
                "use that one, stop it first, or name another folder with --run-dir",
            ))
        }
    }
}

async fn listen(config: &Config) -> Result<TcpListener, Failure> {
    TcpListener::bind(config.listen).await.map_err(|error| {
        let remedy = match error.kind() {
            io::ErrorKind::AddrInUse => "stop what listens there, or choose another address with --listen",
            _ => "choose an address of this host with --listen",
        };
        Failure::new(Exit::Error, format!("cannot listen on {}: {error}", config.listen), remedy)
    })
}

/// Removes the control socket when the agent ends, however it ends.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Binds a socket; the folder's lock is held, so one that is there is left over.
fn listen_unix(path: PathBuf, mode: u32) -> Result<(UnixListener, SocketFile), Failure> {
    let file = SocketFile(path);
    let _ = fs::remove_file(&file.0);
    let bound = UnixListener::bind(&file.0).and_then(|listener| {
        // Accepted connections have it, too: since 3.13.
        set_socket_passcred(&listener, true)?;
        fs::set_permissions(&file.0, fs::Permissions::from_mode(mode))?;
        Ok(listener)
    });
    match bound {
        Ok(listener) => Ok((listener, file)),
        Err(error) => {
            let cause = format!("cannot create the socket {}: {error}", file.0.display());
            Err(Failure::new(Exit::Error, cause, "name another folder with --run-dir"))
        }
    }
}

type Drains = (mpsc::Sender<drain::Command>, watch::Receiver<drain::View>);

/// Starts the task that owns the registered services.
fn spawn_drain(
    supervisor: &mut Supervisor,
    config: &Config,
    state_dir: Option<PathBuf>,
    (subscribers, ask): (&Subscribers, &Asker),
    own: &Own,
) -> Result<Drains, Failure> {
    let (commands, received) = channel(QUEUE);
    let (views, view) = watch::channel(drain::View::default());
    let settings = drain::Settings {
        services: config.services.clone(),
        deadline: config.drain.deadline,
        boot_id: boot_id(),
        refused: (!kernel::sees_host_pids())
            .then(|| "plumb is not in the pid namespace of the host: it sees other numbers".to_owned()),
        run_dir: config.run_dir.clone(),
        state_dir,
    };
    let refused = |why: drain::Refusal| {
        Failure::new(Exit::Error, format!("the services of the settings are refused: {why}"), why.remedy())
    };
    Driver::check(&settings).map_err(refused)?;
    let received = Arc::new(AsyncMutex::new(received));
    let (subscribers, ask, own) = (subscribers.clone(), ask.clone(), own.clone());
    supervisor.spawn("drain", move |stop| {
        let counted = own.clone();
        let tell = Box::new(move |told: Told<'_>| match told {
            Told::Drained(drain) => counted.drained(drain),
            Told::Killed(by) => counted.killed(by),
        });
        let driver = Driver::new(settings.clone(), ask.clone(), views.clone(), tell);
        let (received, events) = (Arc::clone(&received), subscribers.add_own());
        let gauge = own.clone();
        async move {
            let driver = driver.map_err(|why| anyhow::anyhow!("{why}"))?;
            driver.run(&mut *received.lock().await, events, &|count| gauge.registered(count), stop).await;
            Ok(())
        }
    });
    Ok((commands, view))
}

fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// Limits that hold for the whole host. They can be changed at run time, which nobody does.
fn host_limits() -> HostLimits {
    let read = |name| fs::read_to_string(name).ok().and_then(|text| text.trim().parse::<u64>().ok());
    let limits = ["/proc/sys/kernel/pid_max", "/proc/sys/kernel/threads-max"].into_iter().filter_map(read);
    HostLimits { threads: limits.min().unwrap_or(u64::MAX) }
}
