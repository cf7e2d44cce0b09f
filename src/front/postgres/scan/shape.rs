//! What a text may do, as a set of bits.

/// What a text may do. A set of bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shape(u32);

impl Shape {
    /// Makes the database larger.
    pub const GROWS: Shape = Shape(1);
    /// May leave session state that nothing on the wire shows: a function that is not one of PostgreSQL's own,
    /// `DO`, `CALL`, `EXECUTE`. Missed: triggers, defaults, views and operators that call such functions.
    pub const HIDDEN: Shape = Shape(1 << 1);
    /// Makes or uses temporary objects.
    pub const TEMP: Shape = Shape(1 << 2);
    /// Takes a session-level advisory lock.
    pub const ADVISORY: Shape = Shape(1 << 3);
    /// Declares a cursor that outlives its transaction.
    pub const HOLD: Shape = Shape(1 << 4);
    /// Sets something in a way that can't be tracked.
    pub const SETS: Shape = Shape(1 << 5);
    /// Loads a library or seeds the generator: only a new connection is clean of it.
    pub const LOAD: Shape = Shape(1 << 6);
    /// Reads `currval` or `lastval`.
    pub const READS_SEQUENCE: Shape = Shape(1 << 7);
    /// May advance a sequence, and so set `currval` and `lastval`.
    pub const MOVES_SEQUENCE: Shape = Shape(1 << 8);
    /// Releases all advisory locks of the session.
    pub const UNLOCKS_ALL: Shape = Shape(1 << 9);
    /// Closes all cursors.
    pub const CLOSES_ALL: Shape = Shape(1 << 10);
    /// Stops listening to everything.
    pub const UNLISTENS_ALL: Shape = Shape(1 << 14);
    /// Begins or ends a transaction.
    pub const TRANSACTION: Shape = Shape(1 << 11);
    /// A lone SELECT, INSERT, UPDATE, DELETE, VALUES or WITH: worth keeping prepared upstream.
    pub const PLAIN: Shape = Shape(1 << 12);
    /// Reads, or frees storage: what a tenant over its storage may always do.
    pub const FREES: Shape = Shape(1 << 13);

    /// The client listens. Known from the server's answer, not from the text.
    pub const LISTENS: Shape = Shape(1 << 15);
    /// The client has statements prepared in SQL. Known from the server's answer.
    pub const PREPARES: Shape = Shape(1 << 16);
    /// The client has statements that are too large or too many to follow it.
    pub const LARGE: Shape = Shape(1 << 17);

    /// May take prepared statements away: `DISCARD`, `DEALLOCATE`. Whether it did, the server's answer tells.
    pub const WIPES: Shape = Shape(1 << 18);

    /// What a text that was too long to read may do.
    pub const UNREAD: Shape = Shape(Shape::GROWS.0 | Shape::HIDDEN.0 | Shape::MOVES_SEQUENCE.0);

    /// What holds a client to its connection until undone.
    pub const PINS: Shape = Shape(
        Shape::TEMP.0 | Shape::ADVISORY.0 | Shape::HOLD.0 | Shape::SETS.0 | Shape::LOAD.0 | Shape::READS_SEQUENCE.0,
    );

    /// The metric labels of the bits that pin.
    pub fn pin_labels(self) -> impl Iterator<Item = &'static str> {
        [
            (Shape::TEMP, "temp"),
            (Shape::ADVISORY, "advisory_lock"),
            (Shape::HOLD, "cursor_with_hold"),
            (Shape::SETS, "set"),
            (Shape::LOAD, "load"),
            (Shape::READS_SEQUENCE, "currval"),
            (Shape::LISTENS, "listen"),
            (Shape::PREPARES, "sql_prepare"),
            (Shape::LARGE, "large_statement"),
        ]
        .into_iter()
        .filter(move |(shape, _)| self.has(*shape))
        .map(|(_, label)| label)
    }

    /// Whether any bit of `other` is set.
    pub fn has(self, other: Shape) -> bool {
        self.0 & other.0 != 0
    }

    /// The bits of both.
    #[must_use]
    pub fn and(self, other: Shape) -> Shape {
        Shape(self.0 | other.0)
    }

    /// The bits that both have.
    #[must_use]
    pub fn only(self, other: Shape) -> Shape {
        Shape(self.0 & other.0)
    }

    /// Without the bits of `other`.
    #[must_use]
    pub fn without(self, other: Shape) -> Shape {
        Shape(self.0 & !other.0)
    }

    /// Whether no bit is set.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}
