//! How does an answer's body reach a client of this sidecar?

use std::cell::RefCell;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::RecvStream;
use http_body::{Body, Frame, SizeHint};

use super::{BodyError, cleaned, in_http1};
use crate::app::AppAnswer;
use crate::client::StreamBody;
use crate::exchange::Exchange;
use crate::framing::Turn;
use crate::header_size;
use crate::limits;
use crate::payload::Upload;
use crate::trailers::Named;
use crate::upstream::pool::Slot;
use crate::upstream::readers::{Answer, Reading, Registered};

/// An answer's body on its way to a client of this sidecar; it owns the exchange, which ends with it.
pub(crate) struct AnswerBody {
    source: Source,
    /// The client has something to take, as far as its connection is told.
    owed: bool,
    exchange: Option<Exchange>,
    /// The trailers that an HTTP/1 client may get.
    named: Option<Named>,
    /// The client's next head is looked at once this answer has ended.
    _turn: Option<Turn>,
}

enum Source {
    Fixed(Option<Bytes>),
    Peer(PeerAnswer),
    /// A larger one, which can be given up.
    Shared(Rc<SharedAnswer>, Rc<Reading>, #[allow(dead_code, reason = "left when it is dropped")] Registered),
    App(AppAnswer),
}

/// A peer's answer, which holds its stream, and what is left of the request's body: it ends with the answer.
struct PeerAnswer {
    body: StreamBody,
    _slot: Slot,
    _upload: Option<Upload>,
}

/// A peer's answer that others may take away from a client that does not read it.
struct SharedAnswer(RefCell<Option<PeerAnswer>>);

impl Answer for SharedAnswer {
    fn give_up(&self) {
        self.0.borrow_mut().take();
    }
}

impl SharedAnswer {
    fn poll(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut *self.0.borrow_mut() {
            Some(answer) => answer.body.poll(cx),
            None => Poll::Ready(Some(Err(BodyError::Unread))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.0.borrow().as_ref().is_some_and(|answer| answer.body.is_end_stream())
    }
}

impl AnswerBody {
    /// An answer of the sidecar's own.
    pub(crate) fn fixed(text: Bytes, exchange: Option<Exchange>, turn: Option<Turn>) -> Self {
        let text = (!text.is_empty()).then_some(text);
        Self::new(Source::Fixed(text), exchange, turn)
    }

    fn new(source: Source, exchange: Option<Exchange>, turn: Option<Turn>) -> Self {
        let mut body = Self { source, owed: false, exchange, named: None, _turn: turn };
        body.owes(!body.is_end_stream());
        body
    }

    /// Has it end as HTTP/1 lets it: with the trailers of these names.
    pub(crate) fn in_http1(&mut self, named: Named) {
        self.named = Some(named);
    }

    /// Whether it is the answer to a call of a service that is declared to speak gRPC.
    pub(crate) fn is_call(&self) -> bool {
        self.exchange.as_ref().is_some_and(Exchange::is_call)
    }

    /// Tells the client's connection whether something is there that the client has not taken.
    fn owes(&mut self, owed: bool) {
        if let Some(exchange) = &self.exchange
            && owed != self.owed
        {
            exchange.via().place.owes(owed);
        }
        self.owed = owed;
    }

    /// A peer's answer of a length, where it has one.
    pub(crate) fn peer(
        recv: RecvStream,
        length: Option<u64>,
        slot: Slot,
        upload: Option<Upload>,
        exchange: Exchange,
        turn: Option<Turn>,
    ) -> Self {
        let readers = Rc::clone(slot.readers());
        let answer = PeerAnswer { body: StreamBody::new(recv), _slot: slot, _upload: upload };
        if answer.body.is_end_stream() || length.is_some_and(|length| length <= limits::SMALL_ANSWER) {
            return Self::new(Source::Peer(answer), Some(exchange), turn);
        }
        let shared = Rc::new(SharedAnswer(RefCell::new(Some(answer))));
        let reading = Rc::new(Reading::unread());
        let weak: Weak<dyn Answer> = Rc::downgrade(&(Rc::clone(&shared) as Rc<dyn Answer>));
        let registered = readers.register(&reading, weak);
        Self::new(Source::Shared(shared, reading, registered), Some(exchange), turn)
    }

    /// The application's answer.
    pub(crate) fn app(answer: AppAnswer, exchange: Exchange, turn: Option<Turn>) -> Self {
        Self::new(Source::App(answer), Some(exchange), turn)
    }

    /// Notes that the client did not read it. Others may share its connection, so its line alone says whose it was.
    pub(crate) fn not_read(&mut self) {
        if let Some(exchange) = &mut self.exchange {
            exchange.ended("idle");
        }
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        if let Some(exchange) = &this.exchange {
            exchange.via().place.taken();
        }
        let polled = match &mut this.source {
            Source::Fixed(text) => Poll::Ready(text.take().map(|text| Ok(Frame::data(text)))),
            Source::Peer(answer) => answer.body.poll(cx),
            Source::Shared(answer, reading, _) => {
                let polled = answer.poll(cx);
                reading.asked(polled.is_ready());
                polled
            }
            Source::App(answer) => Pin::new(answer).poll_frame(cx),
        };
        this.owes(polled.is_ready());
        let mut frame = cleaned(ready!(polled));
        if let (Some(named), Some(exchange)) = (&this.named, &this.exchange) {
            frame = in_http1(frame, named, &exchange.worker().metrics);
        }
        let Some(exchange) = &mut this.exchange else { return Poll::Ready(frame) };
        if let Some(Ok(piece)) = &frame {
            exchange.response_bytes(piece.data_ref().map_or(0, Bytes::len));
            if piece.trailers_ref().is_some_and(|own| header_size::check(own, limits::HEADER_BYTES).is_err())
            {
                exchange.refused(&BodyError::TooLarge.by_sender());
                frame = Some(Err(BodyError::TooLarge));
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Fixed(text) => text.is_none(),
            Source::Peer(answer) => answer.body.is_end_stream(),
            Source::Shared(answer, ..) => answer.is_end_stream(),
            Source::App(answer) => answer.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Fixed(text) => SizeHint::with_exact(text.as_ref().map_or(0, |text| text.len() as u64)),
            Source::Peer(answer) if answer.body.is_end_stream() => SizeHint::with_exact(0),
            Source::Shared(answer, ..) if answer.is_end_stream() => SizeHint::with_exact(0),
            Source::Peer(_) | Source::Shared(..) => SizeHint::default(),
            Source::App(answer) => answer.size_hint(),
        }
    }
}

impl Drop for AnswerBody {
    fn drop(&mut self) {
        self.owes(false);
    }
}
