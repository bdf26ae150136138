//! What becomes of the requests of connections that are followed from their first packet on.

use std::{
    io::Write,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd,
    thread,
};

use plumb::losses::Class;
use plumb_common::sockets::Port;

use super::{Stage, Told, WAYS_IN, hands::*, listen, netns, port_of};

/// Plays a scenario in each way in, and compares what was told. What the script returns stays open until then.
#[track_caller]
fn play<Open>(
    stage: &mut Stage,
    what: &str,
    expected: &Told,
    script: impl Fn(&mut Stage, u32, TcpListener, IpAddr) -> Open,
) {
    for (at, from) in WAYS_IN {
        let Some(listener) = listen(at) else { continue };
        let slot = stage.follow(port_of(&listener));
        let open = script(stage, slot, listener, from);
        stage.expect(slot, &format!("{what}, at {at} from {from}"), expected);
        drop(open);
    }
}

/// One connection that the service closes, of a client that then hangs up.
fn one(
    script: impl Fn(&TcpStream, TcpStream),
) -> impl Fn(&mut Stage, u32, TcpListener, IpAddr) -> TcpListener {
    move |_, _, listener, from| {
        let (client, server) = pair(&listener, from);
        script(&client, server);
        listener
    }
}

fn closed(connected: u64, closed: u64) -> Told {
    Told::counting(&[("connected", connected), ("closed_by_service", closed)])
}

#[test]
fn what_waits_in_the_queue_of_a_listener_that_closes_is_lost_one_by_one() {
    let mut stage = Stage::new();
    for with_data in [false, true] {
        let expected = Told::counting(&[("connected", 5)]).losing(Class::AcceptQueue, 5).closing(&[5]);
        play(&mut stage, &format!("data: {with_data}"), &expected, |stage, slot, listener, from| {
            let clients: Vec<TcpStream> = (0..5).map(|_| connect(&listener, from)).collect();
            stage.until_counted(slot, "connected", 5);
            if with_data {
                clients.iter().for_each(ask);
            }
            drop(listener);
            clients.iter().for_each(is_reset);
        });
    }
    let nothing = Told::default().closing(&[0]);
    play(&mut stage, "an empty queue", &nothing, |_, _, listener, _| drop(listener));
    stage.is_complete();
}

#[test]
fn who_connects_where_nobody_listens_is_counted_as_refused() {
    let mut stage = Stage::new();
    let expected = Told::counting(&[("refused", 3)]).closing(&[0]);
    play(&mut stage, "refused", &expected, |stage, slot, listener, from| {
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        stage.until(slot, "the end of the listener", |told| !told.backlogs.is_empty());
        for _ in 0..3 {
            TcpStream::connect(SocketAddr::new(from, port)).unwrap_err();
        }
    });
    stage.is_complete();
}

#[test]
fn a_request_that_was_answered_is_not_lost() {
    let mut stage = Stage::new();
    play(
        &mut stage,
        "one",
        &closed(1, 1),
        one(|client, server| {
            serve(client, &server);
            drop(server);
            is_closed(client);
        }),
    );
    play(
        &mut stage,
        "ten",
        &closed(1, 1),
        one(|client, server| {
            (0..10).for_each(|_| serve(client, &server));
            drop(server);
            is_closed(client);
        }),
    );
    play(
        &mut stage,
        "none came",
        &closed(1, 1),
        one(|client, server| {
            drop(server);
            is_closed(client);
        }),
    );
    play(
        &mut stage,
        "the answer is still on its way",
        &closed(1, 1),
        one(|client, server| {
            ask(client);
            read_request(&server);
            answer(&server);
            drop(server);
            read_answer(client);
            is_closed(client);
        }),
    );
    stage.is_complete();
}

#[test]
fn a_request_is_lost_by_its_class() {
    let mut stage = Stage::new();
    let unanswered = closed(1, 1).losing(Class::Unanswered, 1);
    play(
        &mut stage,
        "read",
        &unanswered,
        one(|client, server| {
            ask(client);
            read_request(&server);
            drop(server);
            is_closed(client);
        }),
    );
    play(
        &mut stage,
        "answered once, then read",
        &unanswered,
        one(|client, server| {
            serve(client, &server);
            ask(client);
            read_request(&server);
            drop(server);
            is_closed(client);
        }),
    );
    let unread = Told::counting(&[("connected", 1)]).losing(Class::Unread, 1);
    play(
        &mut stage,
        "never read",
        &unread,
        one(|client, server| {
            ask(client);
            drop(server);
            is_reset(client);
        }),
    );
    let raced = Told::counting(&[("connected", 1)]).losing(Class::KeepAliveRace, 1);
    play(
        &mut stage,
        "the second is not read",
        &raced,
        one(|client, server| {
            serve(client, &server);
            ask(client);
            drop(server);
            is_reset(client);
        }),
    );
    stage.is_complete();
}

#[test]
fn a_request_after_the_close_is_lost_to_the_race() {
    let mut stage = Stage::new();
    let raced = closed(1, 1).losing(Class::KeepAliveRace, 1).late();
    play(
        &mut stage,
        "it comes later",
        &raced,
        one(|mut client, server| {
            serve(client, &server);
            drop(server);
            is_closed(client);
            client.write_all(REQUEST).unwrap();
            is_broken(client);
        }),
    );
    play(
        &mut stage,
        "it has crossed the close",
        &raced,
        one(|mut client, server| {
            serve(client, &server);
            hear_nothing(client);
            drop(server);
            is_closed_there(client);
            client.write_all(REQUEST).unwrap();
        }),
    );
    let first = closed(1, 1).losing(Class::Unread, 1).late();
    play(
        &mut stage,
        "the first of its connection",
        &first,
        one(|mut client, server| {
            drop(server);
            is_closed(client);
            client.write_all(REQUEST).unwrap();
            is_broken(client);
        }),
    );
    let aborted = Told::counting(&[("connected", 1), ("aborted", 1)]);
    let aborted = aborted.losing(Class::KeepAliveRace, 1).late();
    play(
        &mut stage,
        "it has crossed a reset",
        &aborted,
        one(|mut client, server| {
            serve(client, &server);
            hear_nothing(client);
            abort(server);
            is_closed_there(client);
            client.write_all(REQUEST).unwrap();
        }),
    );
    stage.is_complete();
}

#[test]
fn who_hangs_up_first_loses_nothing_and_is_counted() {
    let mut stage = Stage::new();
    let by_peer = |more: &[(&'static str, u64)]| Told::counting(&[&[("connected", 1)], more].concat());
    let by_peer_first = by_peer(&[("closed_by_peer", 1)]);
    play(&mut stage, "after the answer", &by_peer_first, |_, _, listener, from| {
        let (client, server) = pair(&listener, from);
        serve(&client, &server);
        drop(client);
        is_closed(&server);
        listener
    });
    play(
        &mut stage,
        "half, and gets its answer",
        &by_peer_first,
        one(|client, server| {
            ask(client);
            half_close(client);
            read_request(&server);
            is_closed(&server);
            answer(&server);
            drop(server);
            read_answer(client);
            is_closed(client);
        }),
    );
    let reset = by_peer(&[("reset_by_peer", 1)]);
    play(&mut stage, "by a reset", &reset, |stage, slot, listener, from| {
        let (client, server) = pair(&listener, from);
        ask(&client);
        abort(client);
        stage.until_counted(slot, "reset_by_peer", 1);
        drop(server);
        listener
    });
    play(&mut stage, "in the queue, by a reset", &reset, |stage, slot, listener, from| {
        let client = connect(&listener, from);
        stage.until_counted(slot, "connected", 1);
        abort(client);
        stage.until_counted(slot, "reset_by_peer", 1);
        listener
    });
    // It waits for nothing, as far as the kernel can tell.
    let given_up = by_peer(&[("closed_by_peer", 1), ("aborted", 1)]);
    play(&mut stage, "before its request was read", &given_up, |stage, slot, listener, from| {
        let (client, server) = pair(&listener, from);
        ask(&client);
        drop(client);
        stage.until_counted(slot, "closed_by_peer", 1);
        drop(server);
        listener
    });
    stage.is_complete();
}

#[test]
fn a_connection_that_the_service_resets_loses_only_what_was_not_answered() {
    let mut stage = Stage::new();
    let aborted = Told::counting(&[("connected", 1), ("aborted", 1)]);
    play(
        &mut stage,
        "answered",
        &aborted,
        one(|client, server| {
            serve(client, &server);
            abort(server);
            is_reset(client);
        }),
    );
    let unanswered = Told::counting(&[("connected", 1)]).losing(Class::Unanswered, 1);
    play(
        &mut stage,
        "read",
        &unanswered,
        one(|client, server| {
            ask(client);
            read_request(&server);
            abort(server);
            is_reset(client);
        }),
    );
    stage.is_complete();
}

#[test]
fn a_service_that_closes_its_half_first_loses_by_the_same_classes() {
    let mut stage = Stage::new();
    play(
        &mut stage,
        "answered",
        &closed(1, 1),
        one(|client, server| {
            serve(client, &server);
            half_close(&server);
            is_closed(client);
            drop(server);
        }),
    );
    play(
        &mut stage,
        "read",
        &closed(1, 1).losing(Class::Unanswered, 1),
        one(|client, server| {
            ask(client);
            read_request(&server);
            half_close(&server);
            is_closed(client);
            drop(server);
        }),
    );
    play(
        &mut stage,
        "not read",
        &closed(1, 1).losing(Class::Unread, 1),
        one(|client, server| {
            ask(client);
            half_close(&server);
            drop(server);
            is_broken(client);
        }),
    );
    play(
        &mut stage,
        "asked once more by who then hangs up, too",
        &closed(1, 1).losing(Class::KeepAliveRace, 1),
        |_, _, listener, from| {
            let (client, server) = pair(&listener, from);
            serve(&client, &server);
            half_close(&server);
            is_closed(&client);
            ask(&client);
            drop(client);
            // It reads what nobody can answer.
            read_request(&server);
            is_closed(&server);
            listener
        },
    );
    stage.is_complete();
}

#[test]
fn a_large_request_is_lost_once() {
    let mut stage = Stage::new();
    let large = vec![b'x'; 40_000];
    let unread = Told::counting(&[("connected", 1)]).losing(Class::Unread, 1);
    play(
        &mut stage,
        "not read",
        &unread,
        one(|client, server| {
            for piece in large.chunks(4_000) {
                deliver(client, piece);
            }
            drop(server);
            is_reset(client);
        }),
    );
    play(
        &mut stage,
        "half of it read",
        &unread,
        one(|client, server| {
            for piece in large.chunks(4_000) {
                deliver(client, piece);
            }
            read_exactly(&server, &large[..20_000]);
            drop(server);
            is_reset(client);
        }),
    );
    play(
        &mut stage,
        "all of it read",
        &closed(1, 1).losing(Class::Unanswered, 1),
        one(|client, server| {
            for piece in large.chunks(4_000) {
                deliver(client, piece);
            }
            read_exactly(&server, &large);
            drop(server);
            is_closed(client);
        }),
    );
    let raced = closed(1, 1).losing(Class::KeepAliveRace, 1).late();
    play(
        &mut stage,
        "after the close",
        &raced,
        one(|mut client, server| {
            serve(client, &server);
            hear_nothing(client);
            drop(server);
            is_closed_there(client);
            for piece in large.chunks(2_000).take(5) {
                client.write_all(piece).unwrap();
            }
        }),
    );
    stage.is_complete();
}

#[test]
fn the_end_of_a_process_closes_what_it_had_and_is_told_with_it() {
    let mut stage = Stage::new();
    let expected = Told::counting(&[("connected", 6), ("closed_by_service", 2)])
        .losing(Class::AcceptQueue, 2)
        .losing(Class::KeepAliveRace, 1)
        .losing(Class::Unread, 1)
        .losing(Class::Unanswered, 1)
        .exiting()
        .closing(&[2]);
    play(&mut stage, "killed", &expected, |stage, slot, listener, from| {
        let mut pairs: Vec<(TcpStream, TcpStream)> = (0..4).map(|_| pair(&listener, from)).collect();
        let queued: Vec<TcpStream> = (0..2).map(|_| connect(&listener, from)).collect();
        stage.until_counted(slot, "connected", 6);
        let [idle, again, unread, read] = &pairs[..] else { unreachable!() };
        serve(&idle.0, &idle.1);
        serve(&again.0, &again.1);
        [&again.0, &unread.0, &read.0].into_iter().for_each(ask);
        read_request(&read.1);
        let mut fds: Vec<i32> = pairs.iter().map(|(_, server)| server.as_raw_fd()).collect();
        fds.push(listener.as_raw_fd());
        let holder = Holder::start(&fds);
        let clients: Vec<TcpStream> = pairs.drain(..).map(|(client, _)| client).collect();
        drop(listener);
        holder.signal(libc::SIGKILL);
        assert_eq!(holder.end(), libc::SIGKILL);
        is_closed(&clients[0]);
        is_closed(&clients[3]);
        [&clients[1], &clients[2]].into_iter().chain(&queued).for_each(is_reset);
    });
    stage.is_complete();
}

#[test]
fn another_network_namespace_with_the_same_port_is_not_ours() {
    let mut stage = Stage::new();
    let ours = listen(WAYS_IN[0].0).unwrap();
    let port = port_of(&ours);
    let slot = stage.follow(port);
    let elsewhere = thread::spawn(move || {
        // SAFETY: of this thread alone.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "root");
        up();
        assert_ne!(netns(), port.netns);
        let address = SocketAddr::new(WAYS_IN[0].0, port.port as u16);
        TcpStream::connect(address).unwrap_err();
        let listener = TcpListener::bind(address).unwrap();
        let from = WAYS_IN[0].1;
        let (client, server) = pair(&listener, from);
        ask(&client);
        read_request(&server);
        drop(server);
        is_closed(&client);
        let late = connect(&listener, from);
        drop((listener, late, client));
        Port { netns: netns(), ..port }
    });
    let other = elsewhere.join().unwrap();
    assert_ne!(other, port);
    stage.expect(slot, "nothing of ours", &Told::default());
    drop(ours);
    stage.expect(slot, "its end", &Told::default().closing(&[0]));
}

/// Brings up the loopback of this thread's network namespace.
fn up() {
    // SAFETY: what the kernel is given is valid, and the fd is closed.
    unsafe {
        let fd = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        let mut wish: libc::ifreq = std::mem::zeroed();
        (wish.ifr_name[0], wish.ifr_name[1]) = (b'l' as libc::c_char, b'o' as libc::c_char);
        wish.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
        assert_eq!(libc::ioctl(fd, libc::SIOCSIFFLAGS, &raw const wish), 0);
        libc::close(fd);
    }
}

#[test]
fn of_listeners_that_share_a_port_only_the_queue_of_the_one_that_closes_is_lost() {
    const CLIENTS: u64 = 32;
    let mut stage = Stage::new();
    let at = SocketAddr::new(WAYS_IN[0].0, 0);
    let first = listen_beside(at);
    let second = listen_beside(first.local_addr().unwrap());
    let slot = stage.follow(port_of(&first));
    let clients: Vec<TcpStream> = (0..CLIENTS).map(|_| connect(&first, WAYS_IN[0].1)).collect();
    stage.until_counted(slot, "connected", CLIENTS);
    second.set_nonblocking(true).unwrap();
    let kept: Vec<TcpStream> =
        std::iter::from_fn(|| second.accept().ok()).map(|(stream, _)| stream).collect();
    let lost = CLIENTS - kept.len() as u64;
    assert!(lost > 0 && !kept.is_empty(), "{lost}");
    drop(first);
    clients.iter().for_each(|client| {
        let address = client.local_addr().unwrap();
        if !kept.iter().any(|server| server.peer_addr().unwrap() == address) {
            is_reset(client);
        }
    });
    let expected =
        Told::counting(&[("connected", CLIENTS)]).losing(Class::AcceptQueue, lost).closing(&[lost as u32]);
    stage.expect(slot, "the first has closed", &expected);
    drop(kept);
    drop(second);
    let expected = Told {
        counts: vec![("connected", CLIENTS), ("closed_by_service", CLIENTS - lost)],
        backlogs: vec![lost as u32, 0],
        ..expected
    };
    stage.expect(slot, "both", &expected);
    stage.is_complete();
}
