//! A client's port that is used again: what comes then is of another connection.

use std::{net::SocketAddr, thread::sleep, time::Duration};

use plumb::losses::Class;

use super::{Stage, Told, WAYS_IN, hands::*, listen, port_of};

/// The kernel gives an address to another connection after a second at the earliest.
const AGAIN: Duration = Duration::from_millis(1100);

#[test]
fn a_client_that_uses_its_port_again_and_is_never_accepted_is_lost_though_its_last_connection_was_not() {
    let mut stage = Stage::new();
    let (at, _) = WAYS_IN[0];
    for (what, act) in
        [("a request", send as fn(&std::net::TcpStream)), ("the last packet of its handshake", probe)]
    {
        let listener = listen(at).unwrap();
        // Only with the first request there is a socket.
        defer_accept(&listener);
        let (slot, to) = (stage.follow(port_of(&listener)), listener.local_addr().unwrap());
        let client = connect_from(SocketAddr::new(at, 0), to);
        let own = client.local_addr().unwrap();
        send(&client);
        let server = accept(&listener);
        read_request(&server);
        answer(&server);
        read_answer(&client);
        drop(server);
        is_closed(&client);
        drop(client);
        sleep(AGAIN);

        let client = connect_from(own, to);
        drop(listener);
        act(&client);
        is_broken(&client);
        let counts = [("connected", 1), ("closed_by_service", 1)];
        let expected = Told::counting(&counts).losing(Class::AcceptQueue, 1).closing(&[0]);
        stage.expect(slot, what, &expected);
    }
    stage.is_complete();
}
