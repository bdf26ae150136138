//! Many connections: none is missed, and what is kept of them is bounded.

use std::{
    hint::spin_loop,
    io::{ErrorKind, Write},
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use plumb::{
    kernel::{Plan, Program},
    losses::Class,
};

use super::{Stage, Told, WAYS_IN, hands::*, listen, port_of};

/// Opened and closed, each with a request: so many per second and for so long, on a machine of its own.
const PER_SECOND: u32 = 10_000;
const TIME: Duration = Duration::from_secs(2);

#[test]
fn of_ten_thousand_connections_a_second_each_is_counted() {
    let mut stage = Stage::new();
    let (at, from) = WAYS_IN[0];
    let listener = listen(at).unwrap();
    let slot = stage.follow(port_of(&listener));
    let begin = Instant::now();
    // The client resets what it has read, so that no port waits for a minute.
    let worker = thread::spawn(move || {
        let (mut done, mut lost) = (0_u64, 0_u64);
        while begin.elapsed() < TIME {
            let due = (begin.elapsed().as_secs_f64() * f64::from(PER_SECOND)) as u64;
            if done >= due {
                thread::sleep(Duration::from_micros(200));
                continue;
            }
            let (client, server) = pair(&listener, from);
            ask(&client);
            if done % 64 == 63 {
                // Not read: a reset.
                drop(server);
                is_reset(&client);
                lost += 1;
            } else {
                read_request(&server);
                answer(&server);
                read_answer(&client);
                abort(client);
                drop(server);
            }
            done += 1;
        }
        (done, lost, listener)
    });
    while !worker.is_finished() {
        stage.read();
        thread::sleep(Duration::from_millis(20));
    }
    let (done, lost, listener) = worker.join().unwrap();
    eprintln!("{:.0} connections per second", done as f64 / TIME.as_secs_f64());
    let expected = Told::counting(&[("connected", done), ("reset_by_peer", done - lost)]);
    stage.expect(slot, "all", &expected.losing(Class::Unread, lost));
    assert_eq!(stage.kernel.conversations().unwrap(), 0, "all of them are over");
    stage.is_complete();
    drop(listener);
}

/// A listener may be closed between any two steps of a handshake: whoever is not refused is lost.
#[test]
fn whoever_connects_as_a_listener_closes_is_refused_or_lost() {
    const ROUNDS: u32 = 300;
    let mut stage = Stage::new();
    let (at, _) = WAYS_IN[0];
    let slot = stage.follow(port_of(&listen(at).unwrap()));
    let (mut lost, mut refused, mut amid) = (0, 0, 0);
    let not_run = stage.kernel.not_run_of(Program::is_evidence);
    for round in 0..ROUNDS {
        let listener = listen(at).unwrap();
        let (port, address) = (port_of(&listener), listener.local_addr().unwrap());
        stage.kernel.follow_port(port, slot).unwrap();
        let client = thread::spawn(move || {
            let mut held = Vec::new();
            let mut reset = 0;
            loop {
                match TcpStream::connect(address) {
                    Ok(stream) => held.push(stream),
                    // Broken, if its end was told before the reset.
                    Err(error)
                        if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) =>
                    {
                        reset += 1;
                    }
                    Err(error) => break (held, reset, error),
                }
            }
        });
        let end = Instant::now() + Duration::from_micros(u64::from(100 + round % 50));
        while Instant::now() < end {
            spin_loop();
        }
        drop(listener);
        let (held, reset, error) = client.join().unwrap();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
        // The kernel drops some connections without a word: their clients learn of it when they ask.
        held.iter().filter(|client| (&**client).write_all(REQUEST).is_ok()).for_each(is_reset);
        lost += held.len() as u64 + reset;
        refused += 1;
        amid += reset;
        stage.unfollow(port);
    }
    stage.until_counted(slot, "refused", refused);
    stage.catch_up();
    // A preemptible kernel skips a program that is already running there: that is counted, and a drain says so.
    let skipped = stage.kernel.not_run_of(Program::is_evidence) - not_run;
    eprintln!("{lost} lost, {amid} of them amid the handshake; {skipped} programs skipped");
    let [(class, told)] = stage.told(slot).lost[..] else { panic!("{:?}", stage.told(slot)) };
    assert_eq!(class, Class::AcceptQueue.word());
    assert!(told <= lost && told + skipped >= lost, "{told} of {lost} told, {skipped} programs skipped");
    stage.is_complete();
}

#[test]
fn connections_beyond_the_room_are_counted_and_lose_by_the_same_classes() {
    const ROOM: u32 = 16;
    let mut stage = Stage::of(Plan { connections: ROOM, ..Plan::SOCKETS });
    let (at, from) = WAYS_IN[0];
    let listener = listen(at).unwrap();
    let slot = stage.follow(port_of(&listener));
    let kept: Vec<(TcpStream, TcpStream)> = (0..ROOM).map(|_| pair(&listener, from)).collect();
    let more: Vec<(TcpStream, TcpStream)> = (0..5).map(|_| pair(&listener, from)).collect();
    assert_eq!(stage.kernel.conversations().unwrap(), ROOM as usize);
    let [answered, read, again, unread, late] = &more[..] else { unreachable!() };
    [answered, again, late].into_iter().for_each(|(client, server)| serve(client, server));
    [read, again, unread].into_iter().for_each(|(client, _)| ask(client));
    [read, again].into_iter().for_each(|(_, server)| read_request(server));
    let clients: Vec<TcpStream> = more.into_iter().map(|(client, _)| client).collect();
    [&clients[0], &clients[1], &clients[2], &clients[4]].into_iter().for_each(is_closed);
    is_reset(&clients[3]);
    (&clients[4]).write_all(REQUEST).unwrap();
    is_broken(&clients[4]);
    let counts = [("connected", u64::from(ROOM) + 5), ("closed_by_service", 4), ("crowded_out", 5)];
    let mut expected = Told::counting(&counts)
        .losing(Class::KeepAliveRace, 1)
        .losing(Class::Unread, 1)
        .losing(Class::Unanswered, 2);
    (expected.late, expected.guessed) = (1, 1);
    stage.expect(slot, "more than there is room for", &expected);
    drop(kept);
    stage.expect(
        slot,
        "the rest",
        &Told {
            counts: vec![counts[0], ("closed_by_service", 4), ("closed_by_peer", u64::from(ROOM)), counts[2]],
            ..expected
        },
    );
    stage.is_complete();
}
