//! Quantities as people write them in configuration: `"10s"`, `"512MB"`. Sizes are powers of 1024, as in
//! PostgreSQL's own settings.

use std::{fmt, time::Duration};

use serde::{Deserialize, Deserializer, de::Visitor};

/// Parses `"500ms"`, `"10s"`, `"5m"`, `"1h"`, `"7d"`. A bare number has no unit and is refused.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let (number, unit) = split(text)?;
    let millis: u64 = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return None,
    };
    Some(Duration::from_millis(number.checked_mul(millis)?))
}

/// Parses `"64KB"`, `"512MB"`, `"1GB"`, `"100B"` into bytes.
pub fn parse_size(text: &str) -> Option<u64> {
    let (number, unit) = split(text)?;
    let bytes: u64 = match unit {
        "B" => 1,
        "KB" | "KiB" => 1 << 10,
        "MB" | "MiB" => 1 << 20,
        "GB" | "GiB" => 1 << 30,
        "TB" | "TiB" => 1 << 40,
        _ => return None,
    };
    number.checked_mul(bytes)
}

fn split(text: &str) -> Option<(u64, &str)> {
    let text = text.trim();
    let at = text.find(|c: char| !c.is_ascii_digit())?;
    Some((text[..at].parse().ok()?, text[at..].trim()))
}

struct Text<T> {
    parse: fn(&str) -> Option<T>,
    expected: &'static str,
}

impl<T> Visitor<'_> for Text<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expected)
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<T, E> {
        (self.parse)(text).ok_or_else(|| E::invalid_value(serde::de::Unexpected::Str(text), &self))
    }
}

/// For `#[serde(deserialize_with)]`: a duration with its unit.
pub fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    deserializer
        .deserialize_str(Text { parse: parse_duration, expected: "a duration such as \"10s\" (ms, s, m, h, d)" })
}

/// For `#[serde(deserialize_with)]`: a size with its unit, in bytes.
pub fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    deserializer.deserialize_str(Text { parse: parse_size, expected: "a size such as \"512MB\" (B, KB, MB, GB, TB)" })
}

/// For `#[serde(deserialize_with)]`: a duration, or `"never"`.
pub fn duration_or_never<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    #[derive(Deserialize)]
    #[serde(transparent)]
    struct Raw(String);
    let Raw(text) = Raw::deserialize(deserializer)?;
    if text == "never" {
        return Ok(None);
    }
    parse_duration(&text)
        .map(Some)
        .ok_or_else(|| serde::de::Error::custom(format!("{text:?} is not a duration such as \"10s\", nor \"never\"")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_need_a_unit_and_never_overflow() {
        assert_eq!(parse_duration("10s"), Some(Duration::from_secs(10)));
        assert_eq!(parse_duration("500 ms"), Some(Duration::from_millis(500)));
        assert_eq!(parse_size("512MB"), Some(536_870_912));
        for bad in ["", "10", "s", "-1s", "1.5h", "10 parsecs", "99999999999999999999d", "18446744073709551615d"] {
            assert_eq!(parse_duration(bad), None, "{bad}");
        }
        assert_eq!(parse_size("99999999999TB"), None);
    }
}
