//! Dates in documents: RFC 3339 in UTC, `2026-11-23T21:00:00Z`, as people write and read them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

const DAY_SECS: u64 = 86_400;

/// Gives the date in whole seconds; a time before 1970 is 1970.
pub(crate) fn format(at: SystemTime) -> String {
    let secs = at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (mut days, rest) = (secs / DAY_SECS, secs % DAY_SECS);
    let mut year = 1970;
    while days >= year_days(year) {
        days -= year_days(year);
        year += 1;
    }
    let mut month = 1;
    while days >= month_days(year, month) {
        days -= month_days(year, month);
        month += 1;
    }
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{:02}T{hour:02}:{minute:02}:{second:02}Z", days + 1)
}

/// Parses what [`format()`] writes; a fraction of a second is allowed and dropped. Years 1970 to 9999.
pub(crate) fn parse(text: &str) -> Option<SystemTime> {
    let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
    let time = match time.split_once('.') {
        Some((time, fraction)) if !fraction.is_empty() && fraction.bytes().all(|b| b.is_ascii_digit()) => time,
        Some(_) => return None,
        None => time,
    };
    let [year, month, day] = numbers(date, '-', [4, 2, 2])?;
    let [hour, minute, second] = numbers(time, ':', [2, 2, 2])?;
    let fits = year >= 1970
        && (1..=12).contains(&month)
        && (1..=month_days(year, month)).contains(&day)
        && hour < 24
        && minute < 60
        && second < 60;
    if !fits {
        return None;
    }
    let days: u64 = (1970..year).map(year_days).sum::<u64>()
        + (1..month).map(|month| month_days(year, month)).sum::<u64>()
        + (day - 1);
    UNIX_EPOCH.checked_add(Duration::from_secs(days * DAY_SECS + hour * 3600 + minute * 60 + second))
}

fn numbers(text: &str, between: char, widths: [usize; 3]) -> Option<[u64; 3]> {
    let mut parts = text.split(between);
    let mut found = [0; 3];
    for (number, width) in found.iter_mut().zip(widths) {
        let part = parts.next().filter(|part| part.len() == width && part.bytes().all(|b| b.is_ascii_digit()))?;
        *number = part.parse().ok()?;
    }
    parts.next().is_none().then_some(found)
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn year_days(year: u64) -> u64 {
    if is_leap(year) { 366 } else { 365 }
}

fn month_days(year: u64, month: u64) -> u64 {
    match month {
        2 if is_leap(year) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_read_as_they_are_written() {
        let known = [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_795_467_661, "2026-11-23T21:01:01Z"),
        ];
        for (secs, text) in known {
            let at = UNIX_EPOCH + Duration::from_secs(secs);
            assert_eq!((format(at).as_str(), parse(text)), (text, Some(at)));
        }
        for day in (0..200_000).step_by(13) {
            let at = UNIX_EPOCH + Duration::from_secs(day * DAY_SECS + 86_399);
            assert_eq!(parse(&format(at)), Some(at));
        }
        assert_eq!(parse("1970-01-01T00:00:01.999Z"), Some(UNIX_EPOCH + Duration::from_secs(1)));
    }

    #[test]
    fn what_is_no_date_is_refused() {
        for bad in [
            "",
            "Z",
            "2026-11-23",
            "2026-11-23T21:01:01",
            "2026-11-23 21:01:01Z",
            "2026-13-01T00:00:00Z",
            "2026-02-29T00:00:00Z",
            "2026-00-01T00:00:00Z",
            "2026-01-00T00:00:00Z",
            "2026-01-01T24:00:00Z",
            "2026-01-01T00:60:00Z",
            "1969-12-31T23:59:59Z",
            "+026-01-01T00:00:00Z",
            "2026-1-01T00:00:00Z",
            "2026-01-01T00:00:00.Z",
            "2026-01-01T00:00:00+02:00",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
