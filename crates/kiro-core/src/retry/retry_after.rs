//! When does a response want the next try?
//!
//! `Retry-After` (RFC 9110, 10.2.3) is a number of seconds or a date in one of the three forms of 5.6.7: all are read, since a
//! recipient must, and nothing is believed that is none of them.

use std::time::Duration;

/// A longer wait is as good as never, and is read as this: a day.
const SECONDS_MAX: u64 = 24 * 60 * 60;

const DAY_SECONDS: i64 = 24 * 60 * 60;

const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];
const MONTHS: [&str; 12] =
    ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/// How long from now a response wants nothing to be tried; zero for a date that has passed. Absent where the field says nothing
/// that can be read: then it is as if it weren't there.
///
/// `now_unix_seconds` is the local time of day, rounded down, so that a date is never met too early. A host whose clock is wrong
/// waits too long or too short, and no longer than its request's deadline allows.
#[must_use]
pub fn parse_retry_after(value: &[u8], now_unix_seconds: u64) -> Option<Duration> {
    let text = std::str::from_utf8(value).ok()?.trim_matches([' ', '\t']);
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        // More digits than a number holds are more seconds than anybody waits.
        let seconds = text.parse().unwrap_or(u64::MAX);
        return Some(Duration::from_secs(seconds.min(SECONDS_MAX)));
    }
    let date = parse_date(text, now_unix_seconds)?;
    let seconds = u64::try_from(date).unwrap_or(0).saturating_sub(now_unix_seconds);
    Some(Duration::from_secs(seconds.min(SECONDS_MAX)))
}

/// Seconds since 1970.
fn parse_date(text: &str, now_unix_seconds: u64) -> Option<i64> {
    if let Some((day_name, rest)) = text.split_once(", ") {
        let (date, time) = rest.strip_suffix(" GMT")?.rsplit_once(' ')?;
        if date.contains('-') {
            // RFC 850: `Sunday, 06-Nov-94 08:49:37 GMT`
            let mut parts = date.split('-');
            let (day, month, year) = (parts.next()?, parts.next()?, parts.next()?);
            if parts.next().is_some() || !DAYS.contains(&day_name) {
                return None;
            }
            let year = full_year(number(year, 2)?, now_unix_seconds)?;
            return seconds_of(year, month, number(day, 2)?, time);
        }
        // IMF-fixdate: `Sun, 06 Nov 1994 08:49:37 GMT`
        let mut parts = date.split(' ');
        let (day, month, year) = (parts.next()?, parts.next()?, parts.next()?);
        if parts.next().is_some() || !is_short_day(day_name) {
            return None;
        }
        return seconds_of(number(year, 4)?, month, number(day, 2)?, time);
    }
    // asctime: `Sun Nov  6 08:49:37 1994`
    let (day_name, rest) = text.split_once(' ')?;
    let (month, rest) = rest.split_once(' ')?;
    let (day, rest) = rest.split_at_checked(2)?;
    let (time, year) = rest.strip_prefix(' ')?.split_once(' ')?;
    if !is_short_day(day_name) {
        return None;
    }
    let day = day.strip_prefix(' ').map_or_else(|| number(day, 2), |digit| number(digit, 1))?;
    seconds_of(number(year, 4)?, month, day, time)
}

fn is_short_day(name: &str) -> bool {
    name.len() == 3 && DAYS.iter().any(|day| day.starts_with(name))
}

/// RFC 9110, 5.6.7: a year of two digits that appears to be more than 50 years ahead is the last one with these digits.
fn full_year(two_digits: i64, now_unix_seconds: u64) -> Option<i64> {
    let now_days = i64::try_from(now_unix_seconds).ok()?.checked_div(DAY_SECONDS)?;
    // A year is a little longer than 365 days: a day or so around New Year doesn't decide between centuries.
    let this_year = now_days.checked_mul(400)?.checked_div(146_097)?.checked_add(1970)?;
    let century = this_year.checked_sub(this_year.checked_rem(100)?)?;
    let year = century.checked_add(two_digits)?;
    if year > this_year.checked_add(50)? { year.checked_sub(100) } else { Some(year) }
}

fn seconds_of(year: i64, month: &str, day: i64, time: &str) -> Option<i64> {
    let month = i64::try_from(MONTHS.iter().position(|name| *name == month)?).ok()?.checked_add(1)?;
    let mut parts = time.split(':');
    let (hour, minute, second) = (parts.next()?, parts.next()?, parts.next()?);
    let (hour, minute, second) = (number(hour, 2)?, number(minute, 2)?, number(second, 2)?);
    // A second 60 is a leap second.
    if parts.next().is_some() || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    if !(1..=days_of_month(year, month)).contains(&day) {
        return None;
    }
    days_from_civil(year, month, day)
        .checked_mul(DAY_SECONDS)?
        .checked_add(hour * 3600 + minute * 60 + second)
}

fn days_of_month(year: i64, month: i64) -> i64 {
    match month {
        4 | 6 | 9 | 11 => 30,
        2 if year % 4 == 0 && (year % 100 != 0 || year % 400 == 0) => 29,
        2 => 28,
        _ => 31,
    }
}

/// Days since 1970 in the Gregorian calendar, for years 0 to 9999 (`days_from_civil` of Howard Hinnant's "chrono-Compatible
/// Low-Level Date Algorithms"): years begin in March, so that the leap day is the last one.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let month_from_march = (month + 9) % 12;
    let day_of_year = (153 * month_from_march + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

/// A number of exactly so many digits.
fn number(text: &str, digits: usize) -> Option<i64> {
    (text.len() == digits && text.bytes().all(|byte| byte.is_ascii_digit())).then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests;
