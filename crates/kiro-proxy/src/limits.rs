//! Where does each bound of the data path stand, and why is it what it is?
//!
//! Every queue, buffer and wait of the sidecar is bounded, and each bound stands here with its reason.

use std::time::Duration;

/// Connections that one worker serves at a time on one listener: ten thousand idle clients, and a few that come. A parked one costs two
/// kilobytes ([`PARK_AFTER`]), so an abuser's idle ones are twenty megabytes; where each has sent a small piece of a head, the HTTP
/// library's ten to twenty-six kilobytes for each of them; larger pieces are bounded by [`HALF_HEADS_BYTES`].
pub(crate) const CONNECTIONS_PER_LISTENER: usize = 10_240;

/// Connections that each listener of a worker is sure of, whatever crowd there is at the others: sidecars need a few each, an
/// application its own pool.
pub(crate) const SURE_CONNECTIONS: usize = 256;

/// Connections of one worker to the application: one for each HTTP/1 client of a listener that is full. Applications have a bound of
/// their own, and most a lower one.
pub(crate) const APP_CONNECTIONS: usize = 10_240;

/// How long a request waits for a connection to the application where all are in use: what a burst needs to pass. Who waits longer
/// only adds to the load.
pub(crate) const APP_WAIT: Duration = Duration::from_secs(1);

/// Callers, paths or header values that a line of `limits` with `per` knows at a time, some sixty bytes each. More of them share one
/// bucket, so that a flood of new ones passes no faster than one does.
pub(crate) const RATE_KEYS: u32 = kiro_core::rate::MAX_KEYS_DEFAULT;

/// Connections of one worker to other sidecars, of which each carries [`STREAMS_PER_CONNECTION`] requests at a time: far more than a
/// service has callees.
pub(crate) const UPSTREAMS: usize = 256;

/// Connections that other sidecars of one identity may have to one worker. Each of their workers needs one, and one more while an
/// old one ends: enough for thirty replicas with two workers each, all of which the kernel may have given to this worker.
pub(crate) const CONNECTIONS_PER_PEER: usize = 128;

/// File descriptors of the process that are no worker's: admin and health with [`ADMIN_CONNECTIONS`] each, logs, files that are polled,
/// DNS, the collector.
pub(crate) const DESCRIPTOR_RESERVE: u64 = 256;

/// File descriptors of a worker that are no connections: its runtime's, its listeners with some twenty local ports, and one
/// connection a listener that was accepted and may have to be closed for want of a place.
pub(crate) const DESCRIPTORS_PER_WORKER: usize = 32;

/// Log lines that strangers can cause at one listener: so many at once, enough to see what they are.
pub(crate) const STRANGER_LINES: u32 = 20;

/// And so many a second from then on: 430,000 a day, which a rotated log holds. The counts in `/metrics` are exact.
pub(crate) const STRANGER_LINES_PER_SECOND: u32 = 5;

/// TLS handshakes that one worker runs at a time on one listener, counted from a client's first byte on: a handshake is the most
/// expensive thing a stranger can ask for. Whoever comes above it waits his turn, which the oldest
/// has to give up after [`ROOM_MADE_AFTER`].
pub(crate) const HANDSHAKES_PER_LISTENER: usize = 256;

/// How long a TLS handshake may take, the wait for its turn included. Ten seconds is what a slow mobile client at the ingress needs.
pub(crate) const HANDSHAKE: Duration = Duration::from_secs(10);

/// How long a connection may take to its first byte; until then it costs a descriptor and nothing else.
pub(crate) const FIRST_BYTE: Duration = Duration::from_secs(30);

/// How long a client may take over a request head, or over its first bytes, and how long its connection may be idle: the HTTP
/// library has one timer for both.
pub(crate) const HEAD: Duration = Duration::from_secs(30);

/// How long a client's HTTP/1 connection may wait for its next request before it is parked. Long enough that a busy one never is, and
/// that parking, which costs a few microseconds, is nothing beside what a request costs at one a second.
pub(crate) const PARK_AFTER: Duration = Duration::from_secs(1);

/// How long a TCP connect to another pod may take. Linkerd's default; a container network answers in microseconds.
pub(crate) const CONNECT: Duration = Duration::from_secs(1);

/// How much longer than its service's timeout a caller waits for an answer. The peer's sidecar knows whether it was its
/// application that was slow, and its word of that is on the way when the time is over.
pub(crate) const PEER_WORD: Duration = Duration::from_millis(500);

/// How long a body may stand still, either way, before its sender is given up.
pub(crate) const BODY_IDLE: Duration = Duration::from_secs(60);

/// Answers up to this size are nobody's concern when they are not read: as many of them as there can be fill half of the connection
/// that brings them.
pub(crate) const SMALL_ANSWER: u64 = CONNECTION_WINDOW as u64 / 2 / STREAMS_PER_CONNECTION as u64;

/// Larger answers on one connection that clients may leave unread for as long as they like, which is [`BODY_IDLE`]: what they hold of the
/// connection's window is half of it. Of more, those that have not been read for longest are given up.
pub(crate) const SLOW_READERS: usize = (CONNECTION_WINDOW / STREAM_WINDOW / 2) as usize;

/// How often slow readers are looked for, while there may be too many. Who has read nothing between two looks, twice, is one.
pub(crate) const SLOW_READERS_EVERY: Duration = Duration::from_millis(500);

/// How long a peer is left alone after TLS with it has failed: a certificate does not mend itself between two requests, and a
/// handshake is the dearest thing to ask for in vain.
pub(crate) const REFUSED_BACK_OFF: Duration = Duration::from_secs(1);

/// How long a peer may have been silent on a connection before it is asked whether it is still there, ahead of the next request. A
/// busy connection is never asked.
pub(crate) const TRUSTED_SILENCE: Duration = Duration::from_secs(1);

/// How long it may take to say so; a living one takes a round trip.
pub(crate) const PONG: Duration = Duration::from_secs(1);

/// How long a connection may be silent before the kernel asks whether its other end is still there; it asks a few times, a third of
/// this apart.
pub(crate) const KEEPALIVE: Duration = Duration::from_secs(15);

/// Bytes of a header block, trailers included. hyper's and h2's default of 16 KiB has broken users of other meshes whose
/// cookies and tokens are larger.
pub(crate) const HEADER_BYTES: usize = 64 * 1024;

/// Bytes that the clients of one worker can make it hold with heads that have begun and do not end, those above
/// [`SMALL_HEAD_BYTES`] alone: five hundred heads as large as they may be, all at the same moment. The HTTP library may have twice as
/// much memory for them.
pub(crate) const HALF_HEADS_BYTES: usize = 32 * 1024 * 1024;

/// Bytes of a head that a connection's read buffer has room for in any case. Nearly all heads are below it, and cost no more when they
/// stand still.
pub(crate) const SMALL_HEAD_BYTES: usize = 8 * 1024;

/// Bytes of a header block towards an application that speaks HTTP/2: libraries whose limit is 16 KiB, as hyper's is, end the connection
/// with all that is on it at four times that.
pub(crate) const APP_H2_HEADER_BYTES: usize = 48 * 1024;

/// Bytes of a header block between sidecars, as HTTP/2 counts them: 32 more for each field, and room for what sidecars add. A
/// head that one sidecar has taken is never too large for the next one.
pub(crate) const PEER_HEADER_LIST_BYTES: u32 = (HEADER_BYTES + HEADER_FIELDS * 32 + 4 * 1024) as u32;

/// Bytes of a header block up to which the HTTP/2 library hands a client's request over, so that its refusal is the sidecar's
/// own and says what is wrong. What is larger still, the library refuses; that is seen from its frames (see [`crate::frames`]).
pub(crate) const CLIENT_HEADER_LIST_BYTES: u32 = 4 * HEADER_BYTES as u32;

/// Header fields a request may have: what fits in `HEADER_BYTES` with short names, and what hyper allocates for.
pub(crate) const HEADER_FIELDS: usize = 256;

/// Bodies up to this size and of known length are held, so that their digest can stand in the signed head.
pub(crate) const DIGEST_BODY_BYTES: usize = 64 * 1024;

/// Copies of requests that a worker has under way, by the mesh file's `mirrors`: a megabyte of held bodies at most, and enough for some
/// hundred a second to a service that answers within a tenth of one. Where it does not, originals matter more than copies.
pub(crate) const COPIES: usize = 16;

/// How long a copy may take, its answer included: as long as a call takes where the mesh file says nothing. Nobody waits for it.
pub(crate) const COPY: Duration = Duration::from_secs(15);

/// What is read of the answer to a copy, so that a service sees most of its answers taken: as much as a body that is held.
pub(crate) const COPY_ANSWER_BYTES: usize = 64 * 1024;

/// Streams that a peer may have open on one connection. One connection a worker carries all requests to a peer, so this is
/// also the concurrency between two workers.
pub(crate) const STREAMS_PER_CONNECTION: u32 = 1024;

/// Streams that a client of this sidecar may have open on one connection: what browsers and gRPC libraries are used to.
pub(crate) const CLIENT_STREAMS: u32 = 256;

/// Interim answers (1xx) to one request that are passed on. An application needs one or two.
pub(crate) const INTERIM_ANSWERS: usize = 16;

/// Heads that one answer may come with: its interim ones, its own, and trailers. A sidecar passes no more on.
pub(crate) const HEADS_PER_ANSWER: u32 = INTERIM_ANSWERS as u32 + 2;

/// Heads of answers that a connection may bring: at once, where every stream that there can be gets all that it may, and a second.
/// What requests make of them comes on top.
pub(crate) const ANSWER_HEADS: (u32, u32) = (HEADS_PER_ANSWER * STREAMS_PER_CONNECTION, 1000);

/// How long a body waits for leave to be sent (`Expect: 100-continue`) before it is sent all the same. curl's own patience.
pub(crate) const CONTINUE: Duration = Duration::from_secs(1);

/// Connections of one worker to an application that speaks HTTP/2; each carries as many streams as the application allows, by default
/// a hundred or more.
pub(crate) const APP_H2_CONNECTIONS: usize = 8;

/// How many frames that carry nothing, and how many resets of streams, a connection may bring: at once, and a second. What requests
/// and answers need of them comes on top (see [`crate::frames`]).
#[derive(Debug, Clone, Copy)]
pub(crate) struct FrameAllowance {
    /// PING, SETTINGS, WINDOW_UPDATE, PRIORITY, unknown and empty frames.
    pub(crate) control: (u32, u32),
    /// RST_STREAM.
    pub(crate) resets: (u32, u32),
}

/// What a client of this sidecar may do: gRPC libraries send a PING a second or two, and with each timeout a reset; all streams that a
/// client may have open can time out at once, twice.
pub(crate) const CLIENT_FRAMES: FrameAllowance =
    FrameAllowance { control: (1000, 50), resets: (2 * CLIENT_STREAMS, 100) };

/// What another sidecar may do, whichever of the two opened the connection, and what an application that speaks HTTP/2 may. One
/// connection carries what all of an edge's clients do, so those who hang up in a crowd must not cost the others their connection.
pub(crate) const PEER_FRAMES: FrameAllowance =
    FrameAllowance { control: (10_000, 1000), resets: (8 * STREAMS_PER_CONNECTION, 2000) };

/// Streams that a client may have reset before their requests were looked at, which the library holds until then: its own default, far
/// more than a client cancels between two looks.
pub(crate) const CLIENT_PENDING_RESETS: usize = 20;

/// The same between sidecars, where it may be the clients of all of an edge who hang up at once; each costs no more than its head.
pub(crate) const PEER_PENDING_RESETS: usize = STREAMS_PER_CONNECTION as usize;

/// Streams that a peer may make the library reset by its errors, in all the life of a connection: its own default. An honest peer makes
/// none, but for bytes that were on their way to a stream that has long been reset.
pub(crate) const STREAM_ERRORS: usize = 1024;

/// The same for clients: each error comes with a request that was begun, and they lose nobody else's connection.
pub(crate) const CLIENT_STREAM_ERRORS: usize = 256;

/// Streams that a connection may open before other connections get their turn: a burst of requests in one read is otherwise begun as a
/// whole.
pub(crate) const STREAMS_A_TURN: u64 = 32;

/// Streams that were reset here and are remembered for what may still come for them; more are forgotten, which costs nothing but a
/// reset more.
pub(crate) const REMEMBERED_RESETS: usize = 50;

/// What pieces of bodies that are smaller than 256 bytes may cost beyond their bytes while they wait to be read, between sidecars:
/// what h2 takes by itself, half of the window.
pub(crate) const DATA_OVERHEAD_BYTES: usize = CONNECTION_WINDOW as usize / 2;

/// How long a client's HTTP/2 connection may carry no request: longer than the keep-alive of browsers and HTTP libraries.
pub(crate) const CLIENT_IDLE: Duration = Duration::from_secs(300);

/// How long a sidecar that has nothing under way any more waits for its connections to end in order: a round trip, and what is still to
/// be written. Who does not answer in this time has stopped listening.
pub(crate) const FAREWELL: Duration = Duration::from_secs(1);

/// How long a connection that was asked to end may take over it.
pub(crate) const GOODBYE: Duration = Duration::from_secs(5);

/// How long a connection must have carried no request before it may have to make room for another one, where a listener is full. Who
/// has just come is given the time to speak.
pub(crate) const ROOM_MADE_AFTER: Duration = Duration::from_secs(1);

/// How far apart handshakes have to make room for others, at one listener of a worker: a crowd that came at once grows old at once, and
/// as many new handshakes would begin in one moment, for all of which whoever is served by that thread has to wait. Twice as often as
/// [`HANDSHAKES_PER_LISTENER`] turns can grow old.
pub(crate) const TURNS_APART: Duration = Duration::from_millis(2);

/// How many connections make room at a time: looking for those that have been idle for longest takes a look at all.
pub(crate) const ROOM_MADE_AT_A_TIME: usize = 64;

/// Requests that may wait for a free stream on one connection before the next one is refused.
pub(crate) const STREAM_WAITERS: usize = 1024;

/// Flow-control window of a stream: the product of bandwidth and delay on one machine, with room.
pub(crate) const STREAM_WINDOW: u32 = 128 * 1024;

/// Flow-control window of a connection between sidecars. What a slow reader leaves unread counts against it, and all requests of
/// an edge share the connection, so it has to hold many full streams: half of those that may be open. It also bounds what one
/// peer, who has proven who he is, can make a worker hold.
pub(crate) const CONNECTION_WINDOW: u32 = STREAMS_PER_CONNECTION / 2 * STREAM_WINDOW;

/// Flow-control windows of a client's HTTP/2 connection: it shares them with nobody, and anybody can open one.
pub(crate) const CLIENT_STREAM_WINDOW: u32 = 64 * 1024;
/// See [`CLIENT_STREAM_WINDOW`].
pub(crate) const CLIENT_CONNECTION_WINDOW: u32 = 1024 * 1024;

/// Bytes that h2 may hold for sending on one stream of a client: anybody can open all of them with windows as large as he likes, and
/// then not read.
pub(crate) const CLIENT_SEND_BUFFER: usize = 64 * 1024;

/// How long a tunnel whose one half has ended may move nothing in the other: then nobody is left to end it.
pub(crate) const HALF_CLOSED_IDLE: Duration = Duration::from_secs(300);

/// How long a connection to the health listener may last: one question.
pub(crate) const HEALTH_CONNECTION: Duration = Duration::from_secs(5);

/// How long a connection to the admin listener may last: a look, or a scraper's few.
pub(crate) const ADMIN_CONNECTION: Duration = Duration::from_secs(120);

/// Bytes that h2 may hold for sending on one stream between sidecars.
pub(crate) const SEND_BUFFER: usize = 256 * 1024;

/// Bytes that are read of one connection to the application before other connections get their turn: several reads of a large body,
/// and more than a thousand interim answers, which the library takes all at once.
pub(crate) const APP_BYTES_A_TURN: usize = 64 * 1024;

/// How long an idle connection to the application is kept. Below the five seconds after which Node.js closes one, since a
/// request sent into a closing connection is lost.
pub(crate) const APP_IDLE: Duration = Duration::from_secs(4);

/// Idle connections to the application that one worker keeps.
pub(crate) const APP_IDLE_CONNECTIONS: usize = 256;

/// How often a name is resolved again, whatever the TTL says (Docker's DNS answers with 600 s). A new replica is to have its share of
/// the load within three seconds.
pub(crate) const RESOLVE_EVERY: Duration = Duration::from_secs(2);

/// How long one lookup may take.
pub(crate) const RESOLVE: Duration = Duration::from_secs(1);

/// The shortest time between two lookups of a name, however many connects fail.
pub(crate) const RESOLVE_AT_MOST_EVERY: Duration = Duration::from_millis(250);

/// After so many lookups of a name that nobody has called meanwhile (five minutes) it is asked for no more, until the next call.
pub(crate) const RESOLVE_UNUSED: u32 = 150;

/// How long a finished access line may wait in a worker's buffer.
pub(crate) const LOG_FLUSH: Duration = Duration::from_millis(20);

/// Buffer of each direction of an ingress client's tunnel.
pub(crate) const TUNNEL_BUFFER: usize = 16 * 1024;

/// Bytes that a worker reads at once from a tunnel's socket: enough for one system call to carry four of TLS's records.
pub(crate) const TUNNEL_READ: usize = 64 * 1024;

/// A read below this size is copied into memory of its own. Above it the worker's buffer itself goes on, so that what waits for a peer's
/// window holds at most four times its own size.
pub(crate) const TUNNEL_COPY: usize = TUNNEL_READ / 4;

/// Pieces of an HTTP/2 stream that go into a tunnel's socket with one system call.
pub(crate) const TUNNEL_PIECES: usize = 16;

/// How often a local port that can't be had is tried again.
pub(crate) const BIND_AGAIN: Duration = Duration::from_millis(500);

/// How long the workers may take to let go of a local port before another service's turn at it; they take microseconds.
pub(crate) const UNBIND: Duration = Duration::from_secs(1);

/// How often the mesh file is looked at. Changes hold within a second; notifications do not cross every kind of mount.
pub(crate) const FILES_EVERY: Duration = Duration::from_millis(300);

/// Bytes of an application's answer to a health check that are read: a status and a word.
pub(crate) const HEALTH_ANSWER_BYTES: usize = 16 * 1024;

/// Connections that each of the admin listeners serves at a time: people and scrapers, not load.
pub(crate) const ADMIN_CONNECTIONS: usize = 64;
