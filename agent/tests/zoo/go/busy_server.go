// A server with random load: twenty connections a second on average, each of which lives 1 to 5 s.
package main

import (
	"math/rand/v2"
	"net"
	"time"
)

const (
	perSecond = 20
	shortest  = time.Second
	longest   = 5 * time.Second
)

func echo(connection net.Conn) {
	defer connection.Close()
	buffer := make([]byte, 64)
	for {
		length, err := connection.Read(buffer)
		if err == nil {
			_, err = connection.Write(buffer[:length])
		}
		if err != nil {
			return
		}
	}
}

func visit(address string, stay time.Duration) {
	connection, err := net.Dial("tcp", address)
	check(err)
	_, err = connection.Write([]byte("hello"))
	check(err)
	time.Sleep(stay)
	check(connection.Close())
}

func visitAtRandom(address string) {
	random := rand.New(rand.NewPCG(1, 1))
	for {
		time.Sleep(time.Duration(random.ExpFloat64() / perSecond * float64(time.Second)))
		go visit(address, shortest+time.Duration(random.Int64N(int64(longest-shortest))))
	}
}

func main() {
	endAfterArgument()
	if address, ok := peerWord(); ok {
		visitAtRandom(address)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	check(err)
	startPeer(listener.Addr().String())
	for {
		connection, err := listener.Accept()
		check(err)
		go echo(connection)
	}
}
