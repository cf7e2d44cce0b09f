//! The keys of a tenant in a database that others use too: found by walking it in short slices, so that nobody waits
//! for the walk, and never by a command that would show or change what belongs to others.

use std::{
    collections::HashSet,
    hash::{BuildHasher, RandomState},
};

use hashbrown::HashMap;

use super::{Database, Place, dial, dial::DialError};
use crate::wire::resp::{Cursor, Item, put_array, put_bulk, put_request};

/// Keys that the server looks at in one slice: well below a millisecond.
const SLICE: usize = 1000;

/// Keys in a slot that are asked for at once.
const SLOT_MAX_KEYS: i64 = 10_000;

/// Keys weighed at once.
const WEIGHED: usize = 200;

/// Slices without a key after which a client of `SCAN` gets an empty page, so that it sees that it goes on.
const EMPTY_SLICES: usize = 64;

/// The names in the second half of a reply of SCAN, and its cursor.
fn page(answer: &[u8]) -> Result<(Vec<u8>, Vec<Vec<u8>>), DialError> {
    dial::refused(answer)?;
    let mut items = Cursor { rest: answer };
    items.item();
    let Some(Item::Bulk(next)) = items.item() else {
        return Err(DialError::Refused("SCAN gave no cursor".to_owned()));
    };
    let next = next.to_vec();
    Ok((next, names(items)))
}

fn names(mut items: Cursor<'_>) -> Vec<Vec<u8>> {
    let mut names = Vec::new();
    while let Some(item) = items.item() {
        if let Item::Bulk(name) = item {
            names.push(name.to_vec());
        }
    }
    names
}

/// One walk over the database.
struct Walk {
    pattern: Vec<u8>,
    cursor: Vec<u8>,
    begun: bool,
    /// The pattern is all that the tenant has, so that a cluster's slot may be asked instead.
    whole: bool,
}

impl Walk {
    fn over(pattern: Vec<u8>) -> Self {
        Self { pattern, cursor: b"0".to_vec(), begun: false, whole: false }
    }

    /// The next slice; `None` at the end. A key may come twice.
    async fn next(&mut self, place: &Place) -> Result<Option<Vec<Vec<u8>>>, DialError> {
        if self.begun && self.cursor == b"0" {
            return Ok(None);
        }
        if self.whole
            && !self.begun
            && let Some(slot) = place.slot()
        {
            self.begun = true;
            if let Some(names) = in_slot(place, slot).await? {
                return Ok(Some(names));
            }
        }
        self.begun = true;
        let mut ask = Vec::new();
        let count = SLICE.to_string();
        put_request(&mut ask, &[b"SCAN", &self.cursor, b"MATCH", &self.pattern, b"COUNT", count.as_bytes()]);
        let answers = place.ask(&ask, 1).await?;
        let (next, names) = page(&answers[0])?;
        self.cursor = next;
        Ok(Some(names))
    }
}

/// All keys of a slot, the tenant's or not; `None` when there are too many to ask for at once.
async fn in_slot(place: &Place, slot: u16) -> Result<Option<Vec<Vec<u8>>>, DialError> {
    let slot = slot.to_string();
    let mut ask = Vec::new();
    put_request(&mut ask, &[b"CLUSTER", b"COUNTKEYSINSLOT", slot.as_bytes()]);
    let keys = dial::integer(&place.ask(&ask, 1).await?[0]).unwrap_or(i64::MAX);
    if keys > SLOT_MAX_KEYS {
        return Ok(None);
    }
    let mut ask = Vec::new();
    // What is created meanwhile is in nobody's count of before.
    put_request(&mut ask, &[b"CLUSTER", b"GETKEYSINSLOT", slot.as_bytes(), (SLOT_MAX_KEYS * 2).to_string().as_bytes()]);
    let answers = place.ask(&ask, 1).await?;
    dial::refused(&answers[0])?;
    Ok(Some(names(Cursor { rest: &answers[0] })))
}

/// The keys of one logical database.
#[derive(Debug, Default)]
pub struct Tally {
    /// How many.
    pub keys: u64,
    /// Some of them, by their full names.
    pub sample: Vec<Vec<u8>>,
}

impl Place {
    /// Counts the keys of all the tenant's logical databases, and gives up to `sample` of each. Exact for keys that
    /// are there from the beginning to the end.
    ///
    /// # Errors
    /// The server can't be asked.
    ///
    /// # Cancel safety
    /// May be dropped.
    pub async fn tally(&self, sample: usize) -> Result<HashMap<u32, Tally>, DialError> {
        // One walk at a time over all tenants; each rests as long as the last one took.
        let mut turn = self.walking().lock().await;
        tokio::time::sleep_until(*turn).await;
        let begun = tokio::time::Instant::now();
        let prefixes: Vec<(u32, Vec<u8>)> =
            (0..super::DATABASES).map(|number| (number, self.space.prefix(number))).collect();
        let mut tallies: HashMap<u32, Tally> = HashMap::new();
        // Names are remembered by their hash: a key that comes twice counts once.
        let hasher = RandomState::new();
        let mut seen = HashSet::new();
        let mut walk = Walk::over(self.space.pattern());
        walk.whole = true;
        while let Some(names) = walk.next(self).await? {
            for name in names {
                let Some((number, _)) = prefixes.iter().find(|(_, prefix)| name.starts_with(prefix)) else { continue };
                if !seen.insert(hasher.hash_one(&name)) {
                    continue;
                }
                let tally = tallies.entry(*number).or_default();
                tally.keys += 1;
                if tally.sample.len() < sample {
                    tally.sample.push(name);
                }
            }
        }
        let took = begun.elapsed();
        *turn = tokio::time::Instant::now() + took;
        Ok(tallies)
    }

    /// Counts the keys of every logical database by a walk; `own` creations of the caller wait for it. Gives whether the
    /// counts are exact.
    ///
    /// # Errors
    /// The server can't be asked; the old counts stay.
    ///
    /// # Cancel safety
    /// May be dropped.
    pub async fn census(&self, own: u64, now_ms: u64) -> Result<bool, DialError> {
        let databases = self.all();
        let begun: Vec<(u64, u64)> = databases.iter().map(|database| database.ledger.begin()).collect();
        let tallies = self.tally(0).await?;
        let mut exact = true;
        for (database, begun) in databases.iter().zip(begun) {
            let keys = tallies.get(&database.number).map_or(0, |tally| tally.keys);
            exact &= database.ledger.known(keys, begun, own, now_ms);
        }
        Ok(exact)
    }

    /// How many bytes these keys take together, of each so many elements weighed (0: all), and how many are still there.
    ///
    /// # Errors
    /// The server can't be asked.
    pub async fn weigh(&self, names: &[Vec<u8>], elements: u64) -> Result<(u64, u64), DialError> {
        let elements = elements.to_string();
        let (mut seen, mut bytes) = (0, 0);
        for names in names.chunks(WEIGHED) {
            let mut ask = Vec::new();
            for name in names {
                put_request(&mut ask, &[b"MEMORY", b"USAGE", name, b"SAMPLES", elements.as_bytes()]);
            }
            for answer in self.ask(&ask, names.len()).await? {
                if let Some(size) = dial::integer(&answer) {
                    seen += 1;
                    bytes += u64::try_from(size).unwrap_or(0);
                }
            }
        }
        Ok((seen, bytes))
    }

    /// The keys of a database that match a pattern (`KEYS`), bare.
    ///
    /// # Errors
    /// The server can't be asked.
    pub async fn names(&self, database: &Database, pattern: &[u8]) -> Result<Vec<Vec<u8>>, DialError> {
        let mut found = HashSet::new();
        let mut walk = Walk::over([&database.prefix, pattern].concat());
        while let Some(names) = walk.next(self).await? {
            found.extend(names.iter().filter_map(|name| name.strip_prefix(&*database.prefix)).map(<[u8]>::to_vec));
        }
        Ok(found.into_iter().collect())
    }

    /// Any key of a database, bare. The walk begins anywhere, so that it is not always the same one.
    ///
    /// # Errors
    /// The server can't be asked.
    pub async fn any(&self, database: &Database) -> Result<Option<Vec<u8>>, DialError> {
        let chance = RandomState::new();
        for cursor in [chance.hash_one(1) >> 32, 0] {
            let mut walk = Walk::over([&*database.prefix, b"*"].concat());
            walk.cursor = cursor.to_string().into();
            while let Some(names) = walk.next(self).await? {
                let own: Vec<&[u8]> = names.iter().filter_map(|name| name.strip_prefix(&*database.prefix)).collect();
                if !own.is_empty() {
                    let at = usize::try_from(chance.hash_one(2) % own.len() as u64).unwrap_or(0);
                    return Ok(Some(own[at].to_vec()));
                }
            }
        }
        Ok(None)
    }

    /// Deletes the keys of a database, a slice at a time.
    ///
    /// # Errors
    /// The server can't be asked; some are deleted.
    pub async fn empty(&self, database: &Database) -> Result<(), DialError> {
        self.unlink([&*database.prefix, b"*"].concat(), &database.prefix).await
    }

    /// Deletes every key of the tenant.
    ///
    /// # Errors
    /// The server can't be asked; some are deleted.
    pub async fn purge(&self) -> Result<(), DialError> {
        for number in 0..super::DATABASES {
            let prefix = self.space.prefix(number);
            self.unlink([&prefix, &b"*"[..]].concat(), &prefix).await?;
        }
        Ok(())
    }

    async fn unlink(&self, pattern: Vec<u8>, prefix: &[u8]) -> Result<(), DialError> {
        let mut walk = Walk::over(pattern);
        while let Some(names) = walk.next(self).await? {
            let own: Vec<&Vec<u8>> = names.iter().filter(|name| name.starts_with(prefix)).collect();
            if own.is_empty() {
                continue;
            }
            let mut ask = Vec::new();
            put_array(&mut ask, own.len() + 1);
            put_bulk(&mut ask, b"UNLINK");
            own.iter().for_each(|name| put_bulk(&mut ask, name));
            dial::refused(&self.ask(&ask, 1).await?[0])?;
        }
        Ok(())
    }

    /// Runs a `SCAN` (its words, with every pattern inside the prefix) until a page has a key, it is the last one, or
    /// many had none; gives the server's reply.
    ///
    /// # Errors
    /// The server can't be asked.
    pub async fn scan(&self, mut words: Vec<Vec<u8>>) -> Result<Vec<u8>, DialError> {
        for slice in 0.. {
            let mut ask = Vec::new();
            put_request(&mut ask, &words.iter().map(Vec::as_slice).collect::<Vec<_>>());
            let mut answers = self.ask(&ask, 1).await?;
            let answer = answers.swap_remove(0);
            if answer.starts_with(b"-") {
                return Ok(answer);
            }
            let (next, names) = page(&answer)?;
            if !names.is_empty() || next == b"0" || slice >= EMPTY_SLICES {
                return Ok(answer);
            }
            words[1] = next;
        }
        Err(DialError::Slow)
    }
}
