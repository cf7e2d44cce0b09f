//! The task of a link: writes what clients appended, reads what comes, waits for who does not take it.
//!
//! Large values pass in pieces, and a client that does not read is waited for ([`Task::holds`]):
//! - A reply that needs no rewriting is handed on as it comes. While more than
//!   [`BEHIND_BYTES`](crate::upstream::redis::outbox::BEHIND_BYTES) wait for its client the link does not read, so the server waits.
//! - A shared link takes no more requests then: new ones go to a new link, and this one goes on at the client's pace.
//!   If others' replies are outstanding on it, they wait for [`PATIENCE`] only, all pauses of one client's replies
//!   together; after that it reads on, so that the others get theirs, and what the slow client does not take waits in
//!   memory: up to [`PASSED_MAX_BYTES`], at which the link waits again, for [`STRAIN`], and then lets the slow client go.
//!   All that waits is within the caps of [`held`](crate::upstream::redis::held), too.
//! - Whose reply was large is expected to get more ([`Outbox::widen`]): its next commands go to a link of its own,
//!   where nobody is behind it.
//! - A client that takes nothing for [`STALL_MAX`] is let go.

mod answer;

use std::{
    cell::RefCell,
    collections::VecDeque,
    future::poll_fn,
    io,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll},
    time::Duration,
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{Home, How, Link, Pending, Role};
use crate::{
    net::Stream,
    quota::clock,
    upstream::redis::{
        again::{self, Elsewhere},
        held::{Share, TENANT_MAX_BYTES},
        nodes::View,
        outbox::Outbox,
    },
    wire::resp,
};

/// Bytes read at once: large enough that one read serves many clients.
const READ_BYTES: usize = 64 << 10;

/// Unsent request bytes that leave at once although replies are outstanding.
const OUT_EAGER_BYTES: usize = 16 << 10;

/// Longest reply that we have to see whole because names stand in it. Redis' own replies of a million keys fit.
const WHOLE_MAX_BYTES: usize = TENANT_MAX_BYTES;

/// Bytes that wait for a client because others' replies are behind its own. Who asks for more at once than this, and
/// reads slowly, does it at others' cost.
const PASSED_MAX_BYTES: usize = 64 << 20;

/// How long, in all for one client's replies, a shared connection lets others wait for a client that does not read.
const PATIENCE: Duration = Duration::from_millis(20);

/// How long others wait for a client for which [`PASSED_MAX_BYTES`] wait already to take some of it.
const STRAIN: Duration = Duration::from_secs(2);

/// How long a client may take nothing of a large reply before it is let go.
const STALL_MAX: Duration = Duration::from_secs(120);

/// Reads of one wake-up before other tasks get their turn.
const READS_PER_TURN: usize = 4;

/// Write buffer kept between bursts.
const KEPT_BYTES: usize = 64 << 10;

/// How often an unused shared link is looked at; unused for two looks, it is closed.
const IDLE_LOOK: Duration = Duration::from_secs(30);

/// How long a link to a server that does not serve any more may wait for outstanding replies.
const RETIRE: Duration = Duration::from_secs(5);

thread_local! {
    /// No connection owns a read buffer: each thread has one.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_BYTES]);
}

impl Link {
    /// Relays until the connection ends.
    pub async fn run(self: Arc<Self>, stream: Stream, home: Home) {
        let mut views = home.place.upgrade().and_then(|place| place.watch());
        let (slot, address) = (home.slot, Arc::clone(&home.address));
        let mut share = Share::default();
        if let Some(place) = home.place.upgrade() {
            share.join(&place.held);
        }
        let mut retired = None;
        let mut task = Task {
            may_move: views.is_some(),
            home,
            elsewhere: None,
            again: None,
            loads: (Vec::new(), 0),
            behind: None,
            piece: false,
            share,
            link: &self,
            stream,
            queue: VecDeque::new(),
            writing: Vec::new(),
            written: 0,
            carry: Vec::new(),
            scanned: 0,
            reply: resp::Reply::default(),
            scratch: Vec::new(),
        };
        // The first look after a pause: a link that is new has not been used either.
        let mut look = tokio::time::interval_at(tokio::time::Instant::now() + IDLE_LOOK, IDLE_LOOK);
        let mut seen = 0;
        let reason = loop {
            let turn = tokio::select! {
                ended = poll_fn(|cx| task.poll(cx)) => Some(ended),
                _ = look.tick() => None,
                owner = owner(&mut views, slot), if retired.is_none() => {
                    if owner.is_some_and(|owner| owner != address) {
                        self.retire();
                        retired = Some(tokio::time::Instant::now() + RETIRE);
                    }
                    continue;
                }
                () = until(retired) => Some(Some(io::Error::other("the server serves no more"))),
            };
            match turn {
                Some(error) => break error,
                None => {
                    let used = self.used.load(Ordering::Relaxed);
                    let shared = matches!(*self.role.lock(), Role::Shared);
                    if shared && used == seen && task.queue.is_empty() {
                        let mut state = self.state.lock();
                        if state.fresh.is_empty() && state.out.is_empty() {
                            state.closed = true;
                            break None;
                        }
                    }
                    seen = used;
                }
            }
        };
        if let Some(error) = reason {
            tracing::debug!(%error, "a Redis upstream connection ended");
        }
        task.fail();
    }
}

/// The next owner of a slot that is heard of.
async fn owner(views: &mut Option<tokio::sync::watch::Receiver<Arc<View>>>, slot: u16) -> Option<Arc<str>> {
    match views {
        Some(receiver) => match receiver.changed().await {
            Ok(()) => receiver.borrow_and_update().of(slot).cloned(),
            Err(_) => {
                *views = None;
                std::future::pending().await
            }
        },
        None => std::future::pending().await,
    }
}

async fn until(time: Option<tokio::time::Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// A client that does not take what waits for it; see [`Task::holds`].
struct Behind {
    to: Arc<Outbox>,
    /// How long it was waited for before this pause.
    waited: Duration,
    /// When this pause began.
    since: Option<tokio::time::Instant>,
    /// The link takes no more requests because of it.
    retired: bool,
    timer: Pin<Box<tokio::time::Sleep>>,
}

impl Behind {
    fn new(to: Arc<Outbox>) -> Self {
        let timer = Box::pin(tokio::time::sleep(PATIENCE));
        Self { to, waited: Duration::ZERO, since: None, retired: false, timer }
    }

    /// It took something.
    fn go_on(&mut self) {
        self.waited += self.since.take().map_or(Duration::ZERO, |since| since.elapsed());
    }

    /// Whether it was waited for as long as `max`.
    fn is_over(&mut self, max: Duration, cx: &mut Context<'_>) -> bool {
        let until = *self.since.get_or_insert_with(tokio::time::Instant::now) + max;
        if self.timer.deadline() != until {
            self.timer.as_mut().reset(until);
        }
        self.timer.as_mut().poll(cx).is_ready()
    }
}

struct Task<'a> {
    /// The server may stop serving the tenant.
    may_move: bool,
    home: Home,
    /// The group at the head was refused, since its slot is there.
    elsewhere: Option<Elsewhere>,
    /// The group at the head is being run elsewhere.
    again: Option<again::Running>,
    /// Requests that load the scripts that were loaded here, and how many.
    loads: (Vec<u8>, usize),
    /// The client at the head that does not read.
    behind: Option<Behind>,
    /// What is being written is a piece of a request.
    piece: bool,
    /// What `carry` counts among all that is large.
    share: Share,
    link: &'a Arc<Link>,
    stream: Stream,
    queue: VecDeque<Pending>,
    writing: Vec<u8>,
    written: usize,
    /// The unfinished reply that the last read ended in.
    carry: Vec<u8>,
    /// Bytes of `carry` that `reply` has walked.
    scanned: usize,
    reply: resp::Reply,
    scratch: Vec<u8>,
}

impl Task<'_> {
    /// Ready with the reason when the connection is over; `None` when we closed it.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Error>> {
        self.link.waker.register(cx.waker());
        for _ in 0..READS_PER_TURN {
            loop {
                if self.gather() {
                    return Poll::Ready(None);
                }
                if let Err(error) = self.write(cx) {
                    return Poll::Ready(Some(error));
                }
                // What was appended behind a piece has no reply to wait for that would bring us back.
                if !self.writing.is_empty() || !std::mem::take(&mut self.piece) {
                    break;
                }
            }
            if let Some(again) = &mut self.again {
                match again.as_mut().poll(cx) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(result) => {
                        if let Err(error) = self.resume(result) {
                            return Poll::Ready(Some(error));
                        }
                        continue;
                    }
                }
            }
            if self.holds(cx) {
                return Poll::Pending;
            }
            match self.read(cx) {
                Ok(true) => {}
                Ok(false) => return Poll::Pending,
                Err(error) => return Poll::Ready(Some(error)),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Takes what clients appended; gives whether the link is closed.
    fn gather(&mut self) -> bool {
        let outstanding = !self.queue.is_empty();
        {
            let mut state = self.link.state.lock();
            if state.closed {
                return true;
            }
            // Requests and what is expected of them are taken together: what is in the queue has been sent.
            if self.writing.is_empty()
                && (!state.fresh.is_empty() || state.partial && !state.out.is_empty())
                && (!outstanding
                    || state.out.is_empty()
                    || state.out.len() >= OUT_EAGER_BYTES
                    || !self.queue_is_shared())
            {
                self.queue.extend(state.fresh.drain(..));
                self.link.used.fetch_add(1, Ordering::Relaxed);
                std::mem::swap(&mut self.writing, &mut state.out);
                self.piece = state.partial;
                state.mark = 0;
                state.stalled.drain(..).for_each(|client| client.wake());
            }
            if state.retired && self.queue.is_empty() && state.fresh.is_empty() && self.writing.is_empty() {
                state.closed = true;
                return true;
            }
        }
        self.locals();
        false
    }

    fn queue_is_shared(&self) -> bool {
        matches!(*self.link.role.lock(), Role::Shared)
    }

    /// Whether reading has to wait for the client whose reply is coming; see the module.
    fn holds(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(head) = self.queue.front() else {
            self.behind = None;
            return false;
        };
        if !head.to.is_behind(cx) {
            match &mut self.behind {
                Some(behind) if Arc::ptr_eq(&behind.to, &head.to) => behind.go_on(),
                behind => *behind = None,
            }
            return false;
        }
        let to = Arc::clone(&head.to);
        to.widen(clock::now_ms());
        let shared = self.queue_is_shared();
        let others = shared && {
            let state = self.link.state.lock();
            self.queue.iter().chain(&state.fresh).any(|other| !Arc::ptr_eq(&other.to, &to))
        };
        let mut behind = match self.behind.take() {
            Some(behind) if Arc::ptr_eq(&behind.to, &to) => behind,
            _ => Behind::new(Arc::clone(&to)),
        };
        // Nobody comes to stand behind it, and who stands there waits for a short time only.
        if shared && !behind.retired && (!others || behind.is_over(PATIENCE.saturating_sub(behind.waited), cx)) {
            behind.retired = true;
            behind.since = None;
            self.link.retire();
        }
        let passes = behind.retired && others;
        let held = !passes || to.waiting() > PASSED_MAX_BYTES;
        let patience = match (behind.retired || !shared, passes) {
            (_, true) => Some(STRAIN),
            (true, false) => Some(STALL_MAX),
            (false, false) => None,
        };
        if let (true, Some(patience)) = (held, patience)
            && behind.is_over(patience, cx)
        {
            tracing::debug!("a client does not read what it asked for");
            to.lose();
            return false;
        }
        self.behind = Some(behind);
        held
    }

    /// Gives up on a reply that would have to be seen whole, where there is no memory for it: its client is let go,
    /// the others go on.
    fn swallow(&mut self, carry: &mut Vec<u8>) -> io::Result<()> {
        if !self.queue_is_shared() {
            return Err(io::Error::other("a reply over the cap"));
        }
        carry.drain(..self.scanned);
        self.scanned = 0;
        if let Some(head) = self.queue.front_mut() {
            if let How::Transaction(transaction) = &head.how {
                head.count = transaction.acks + 1;
            }
            head.how = How::Raw;
            head.group = None;
            head.to.lose();
        }
        self.link.ledger.shrink();
        Ok(())
    }

    /// Delivers replies of our own that stand at the head.
    fn locals(&mut self) {
        while let Some(Pending { how: How::Local(_), .. }) = self.queue.front() {
            if let Some(Pending { to, count, how: How::Local(bytes), .. }) = self.queue.pop_front() {
                to.deliver(count, |out| out.extend_from_slice(&bytes));
            }
        }
    }

    fn write(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        while self.written < self.writing.len() {
            match Pin::new(&mut self.stream).poll_write(cx, &self.writing[self.written..]) {
                Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(Ok(n)) => self.written += n,
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => return Ok(()),
            }
        }
        if self.written > 0 {
            self.written = 0;
            self.writing.clear();
            if self.writing.capacity() > KEPT_BYTES {
                self.writing = Vec::new();
            }
            if let Poll::Ready(Err(error)) = Pin::new(&mut self.stream).poll_flush(cx) {
                return Err(error);
            }
        }
        Ok(())
    }

    /// Reads once and passes on what is complete; gives whether anything came.
    fn read(&mut self, cx: &mut Context<'_>) -> io::Result<bool> {
        BUFFER.with_borrow_mut(|buffer| {
            let mut target = ReadBuf::new(buffer);
            match Pin::new(&mut self.stream).poll_read(cx, &mut target) {
                Poll::Pending => return Ok(false),
                Poll::Ready(result) => result?,
            }
            let bytes = target.filled();
            if bytes.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            // Requests may have been appended and answered since we last looked (a link is only written by its
            // own task, so their entries are in the queue already).
            if self.carry.is_empty() {
                let used = self.walk(bytes)?;
                self.carry.extend_from_slice(&bytes[used..]);
            } else {
                let mut carry = std::mem::take(&mut self.carry);
                carry.extend_from_slice(bytes);
                let used = self.walk(&carry)?;
                carry.drain(..used);
                if !self.share.set(carry.len()) || carry.len() > WHOLE_MAX_BYTES {
                    self.swallow(&mut carry)?;
                    self.share.set(carry.len());
                }
                if carry.is_empty() && carry.capacity() > KEPT_BYTES {
                    carry = Vec::new();
                }
                self.carry = carry;
            }
            Ok(true)
        })
    }
}
